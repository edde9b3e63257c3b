"""What the trials of a sweep have in common, and how each of them is configured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from ray.actor import ActorHandle

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.config import TrainingConfig
from ray_trainer.config.overrides import apply_overrides
from ray_trainer.storage import Storage
from ray_trainer.task import Experiment


@dataclass(frozen=True)
class SweepJob:
    """All that the trials of a sweep have in common; travels from the driver by pickle.

    Attributes:
        experiment: the user's functions.
        training: without what a trial changes; monitors the metric of the sweep.
        model: likewise.
        cluster: of each trial.
        sweep_dir: the directory of the sweep, a path or URI.
        metric: compares trials.
        counts_steps: progress is counted in steps, not in epochs.
        link: to the driver of the sweep.
    """

    experiment: Experiment
    training: TrainingConfig
    model: dict[str, Any]
    cluster: ClusterConfig
    sweep_dir: str
    metric: str
    counts_steps: bool
    link: ActorHandle

    def run_of(self, trial: str) -> Storage:
        """The directory of a trial."""
        return Storage.open(self.sweep_dir).child(f"trials/{trial}")

    def configure(
        self, trial: str, settings: Mapping[str, Any]
    ) -> tuple[TrainingConfig, ClusterConfig, dict[str, Any]]:
        """The sections of a trial's run.

        Raises:
            ConfigError: its values do not go together.
        """
        values = apply_overrides({"training": self.training.to_dict(), "model": self.model}, settings)
        training = TrainingConfig.from_dict(values["training"])
        training.validate()
        storage_path = Storage.open(self.sweep_dir).child("trials").uri
        return training, replace(self.cluster, name=trial, storage_path=storage_path), values["model"]


def saved_with_each_validation(training: TrainingConfig) -> TrainingConfig:
    """Let each value of the metric have its checkpoint: the one that is best must be there at the end."""
    return replace(
        training,
        save_every_n_epochs=_common(training.save_every_n_epochs, training.validate_every_n_epochs),
        save_every_n_steps=_common(training.save_every_n_steps, training.validate_every_n_steps),
        keep_best_k=max(1, training.keep_best_k),
        keep_last_n=max(2, training.keep_last_n),
    )


def _common(saves: int | None, validations: int | None) -> int | None:
    return gcd(saves, validations) if saves and validations else saves or validations
