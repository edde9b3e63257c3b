"""`sweep`: Ray Tune over ordinary runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from torch import nn

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.launch import build_datasets, validate_sections
from ray_trainer.cluster.ledger import EVENTS, Ledger
from ray_trainer.cluster.link import open_link
from ray_trainer.cluster.overseer import NoSweepDisplay, Overseer, SweepDisplay
from ray_trainer.cluster.ray_tune import quiet_tune, run_trials
from ray_trainer.cluster.readiness import require_cluster, require_storage
from ray_trainer.cluster.session import ray_session, require_resources
from ray_trainer.cluster.sweep_config import SweepConfig, cross_problems
from ray_trainer.cluster.sweep_job import SweepJob, saved_with_each_validation
from ray_trainer.cluster.trials import TrialRecord
from ray_trainer.cluster.watching import signals
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import dump_yaml
from ray_trainer.errors import ConfigError, RunError
from ray_trainer.runtime import Stop, raise_interruption
from ray_trainer.setup import choose_monitor
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding
from ray_trainer.task import Experiment, Task, loss_for

BEST_RUN = "best_run.yaml"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back.

    Attributes:
        best: the trial with the best checkpoint.
        trials: all of them, the best first.
        checkpoint: the best one of the best trial.
        sweep_dir: where everything about the sweep lies, a path or URI.
        run_file: trains with the best trial's settings, with ``ray-trainer train``.
        metric: by which trials were compared; small is better if the mode is min.
    """

    best: TrialRecord
    trials: list[TrialRecord]
    checkpoint: ray.train.Checkpoint
    sweep_dir: str
    run_file: str
    metric: str
    mode: str


def sweep(
    experiment: Experiment,
    training_config: TrainingConfig,
    cluster_config: ClusterConfig | None,
    sweep_config: SweepConfig,
    model_config: Mapping[str, Any] | None = None,
    *,
    display: SweepDisplay | None = None,
    reference: str | None = None,
    take_over: bool = False,
) -> SweepResult:
    """Search for good settings on a Ray cluster; a sweep of the same name and storage path is continued.

    Each trial is a run as `fit` has it, in ``trials/`` of the sweep's directory, with all that keeps a run going.

    Args:
        experiment: as in `fit`.
        training_config: as in `fit`; what a trial does not change.
        cluster_config: of one trial; its name and storage path are those of the sweep.
        sweep_config: what is searched and how.
        model_config: as in `fit`; has a value for all that a trial changes.
        display: shows the sweep while it lasts.
        reference: of the experiment, as ``path/to/file.py:attribute``, for the run file of the best trial.
        take_over: do not ask whether another driver is at work on the sweep.

    Raises:
        ConfigError: a configuration is wrong, or does not belong to the sweep that is there.
        DataError: the data cannot be trained on.
        LeaseHeldError: another driver is at work on the sweep; nothing was written.
        RunError: no trial has come to a result.
        KeyboardInterrupt: after Ctrl-C, once all trials have saved.
        SystemExit: with 143 after SIGTERM, once all trials have saved.
    """
    cluster = cluster_config or ClusterConfig()
    cluster = cluster if cluster.name is not None else replace(cluster, name="sweep")
    model = dict(model_config or {})
    _validate(training_config, cluster, sweep_config, model)
    metric, mode = sweep_config.objective(training_config)
    training = saved_with_each_validation(replace(training_config, monitor=metric, mode=mode))
    task = Task(experiment.task_spec, nn.Identity(), loss_for(experiment.task_spec))
    choose_monitor(training, task.metric_names, validates=True)
    storage = Storage.open(cluster.storage_path).child(str(cluster.name))
    require_storage(storage)
    ledger = Ledger(storage, _definition(training_config, sweep_config, model, metric, mode), metric, mode)
    ledger.require_same_sweep()
    search = _Search(experiment, training, cluster, sweep_config, model, ledger)
    if not search.is_over:
        require_cluster(cluster)
        with holding(storage, take_over=take_over):
            stop = search.carry_out(display or NoSweepDisplay())
            search.write_best(reference)
        raise_interruption(stop)
    return search.result()


class _Search:
    """One start of a sweep."""

    def __init__(
        self,
        experiment: Experiment,
        training: TrainingConfig,
        cluster: ClusterConfig,
        config: SweepConfig,
        model: dict[str, Any],
        ledger: Ledger,
    ) -> None:
        self._experiment = experiment
        self._training = training
        self._cluster = cluster
        self._config = config
        self._model = model
        self._ledger = ledger

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        budget_s = self._config.time_budget_s
        ended = [trial for trial in self._ledger.trials.values() if trial.has_ended]
        is_complete = len(ended) == len(self._ledger.trials) >= self._config.num_trials()
        return is_complete or (budget_s is not None and self._ledger.elapsed_s >= budget_s)

    def carry_out(self, display: SweepDisplay) -> Stop:
        """Run what is left; the signal that ended it, if one did.

        Raises:
            ConfigError: it cannot be carried out at all.
        """
        is_new = not self._ledger.storage.exists(EVENTS)
        with ray_session(self._cluster, shows_output=False), quiet_tune():
            require_resources(self._cluster)
            self._try_datasets()
            self._ledger.open()
            with signals() as wish:
                overseer = Overseer(self._ledger, open_link(), display, wish, self._config)
                run_trials(self._job(overseer.link), self._config, self._ledger, overseer)
                overseer.close()
            display.update(self._ledger.ranked())
        if overseer.refusal is not None:
            self._ledger.conclude("failed", overseer.refusal)
            if is_new:
                self._ledger.erase()
            raise ConfigError(overseer.refusal)
        self._conclude(overseer)
        return overseer.stop

    def _conclude(self, overseer: Overseer) -> None:
        if overseer.stop is not Stop.NONE:
            self._ledger.conclude("interrupted", overseer.stop.name)
        elif overseer.is_out_of_time:
            self._ledger.conclude("out of time", "the time budget is used up")
        else:
            self._ledger.conclude("finished", "")
            self._ledger.storage.delete("exchange")

    def write_best(self, reference: str | None) -> None:
        """Write the run file of the best trial, if there is one yet."""
        best = next(iter(self._ledger.ranked()), None)
        if best is None or best.value is None:
            return
        training, cluster, model = self._job(None).configure(best.name, best.settings)
        storage_path = Storage.open(self._cluster.storage_path).uri
        cluster = replace(cluster, name=f"{self._cluster.name}-best", storage_path=storage_path)
        sections = {"model": model, "training": training.to_dict(), "cluster": cluster.to_dict()}
        where = "" if reference else "# experiment: path/to/file.py:attribute\n"
        text = dump_yaml(({"experiment": reference} if reference else {}) | sections)
        head = f"# the settings of {best.name}, {self._ledger.metric} {best.value!r}\n"
        self._ledger.storage.write(BEST_RUN, (head + where + text).encode())

    def result(self) -> SweepResult:
        """What was found.

        Raises:
            RunError: nothing.
        """
        ledger = self._ledger
        ledger.find_checkpoints()
        order = ledger.ranked()
        if not order or order[0].checkpoint is None:
            reasons = "; ".join(dict.fromkeys(f"{trial.name}: {trial.reason}" for trial in order if trial.reason))
            raise RunError(
                f"No trial of the sweep has come to a result ({reasons or 'there was no time'}). What there is lies in "
                f"{ledger.storage.uri}; after a change of the settings give the sweep another cluster.name."
            )
        place = ledger.run_of(order[0]).child(order[0].checkpoint.rstrip("/").rpartition("/")[2])
        return SweepResult(
            best=order[0],
            trials=order,
            checkpoint=ray.train.Checkpoint(path=place.path, filesystem=place.filesystem),
            sweep_dir=ledger.storage.uri,
            run_file=f"{ledger.storage.uri}/{BEST_RUN}",
            metric=ledger.metric,
            mode=ledger.mode,
        )

    def _try_datasets(self) -> None:
        """Find out before any trial starts whether it will have the metric, and whether the data can be built."""
        datasets = build_datasets(self._experiment, self._model, self._training)
        validates = "val" in datasets or self._training.validation_split > 0
        monitor = choose_monitor(self._training, (), validates) if not validates else self._ledger.metric
        if monitor != self._ledger.metric:
            raise ConfigError(
                f"sweep.metric: {self._ledger.metric} needs validation data, and the experiment has none. Return 'val' "
                f"from build_datasets, set training.validation_split, or compare by {monitor}."
            )

    def _job(self, link: Any) -> SweepJob:
        return SweepJob(
            experiment=self._experiment,
            training=self._training,
            model=self._model,
            cluster=self._cluster,
            sweep_dir=self._ledger.storage.uri,
            metric=self._ledger.metric,
            counts_steps=self._training.validate_every_n_steps is not None,
            link=link,
        )


def _validate(training: TrainingConfig, cluster: ClusterConfig, config: SweepConfig, model: Mapping[str, Any]) -> None:
    validate_sections(training=training, cluster=cluster, sweep=config)
    missing = config.missing_package()
    if missing is not None:
        raise ConfigError(missing)
    problem = cross_problems(config, model, training)
    if not config.space:
        problem = "is empty; say which settings to vary, as in {training.learning_rate: {loguniform: [1.0e-4, 1.0e-1]}}"
    if problem is not None:
        raise ConfigError(f"Configuration validation failed:\n  - sweep.space: {problem}")


def _definition(
    training: TrainingConfig, config: SweepConfig, model: Mapping[str, Any], metric: str, mode: str
) -> dict[str, Any]:
    """What makes a sweep this one: with another one of these its trials could not be compared."""
    free = {"max_concurrent_trials", "time_budget", "metric", "mode"}
    if config.scheduler != "pbt":
        free.add("num_samples")  # more trials of the same kind
    searched = {f"sweep.{name}": value for name, value in config.to_dict().items() if name not in free}
    trained = {
        f"training.{name}": value for name, value in training.to_dict().items() if name not in ("monitor", "mode")
    }
    return {**searched, **trained, "model": dict(model), "metric": metric, "mode": mode}
