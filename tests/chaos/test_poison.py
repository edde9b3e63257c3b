"""Batches that raise, kill their process or give no numbers, on Ray, and a worker that dies just then."""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from cluster_runs import assert_same_run, ray_of_two_cpus, whole_lines
from experiments import events
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit
from ray_trainer.metrics import EventLog
from ray_trainer.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

SIZE, NUM_WORKERS, BATCH = 96, 3, 2  # not shuffled: sixteen steps an epoch, of six samples each
RAISES, CRASHES, NO_NUMBER = 14, 34, 60  # in step 3 on rank 1, in step 6 on rank 2, in step 11 on rank 0
KILL_AFTER = 9  # the point to go back to is step 8


class Points(Dataset):
    """Random points; the first feature is the number of the sample."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(SIZE, 5, generator=generator)
        self.features[:, 0] = torch.arange(SIZE)
        self.labels = torch.randint(0, 3, (SIZE,), generator=generator)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


class Poisoned(nn.Module):
    """Cannot take some samples."""

    def __init__(self, witness: "Witness") -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.witness = witness

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        samples = features[:, 0].int().tolist()
        if self.training:
            self.witness.samples = samples
            if RAISES in samples:
                raise ZeroDivisionError(f"sample {RAISES}")
            if CRASHES in samples:
                with Path(self.witness.directory, "crashed").open("a") as file:
                    file.write(f"{os.getpid()}\n")
                ctypes.string_at(0)  # SIGSEGV of this thread, which goes no further
        output = self.layers(features[:, 1:])
        return output * torch.nan if self.training and NO_NUMBER in samples else output


class Witness(DefaultHooks):
    """Writes down which samples each step of each rank was made of, and dies after a step if a file asks for it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.samples: list[int] = []

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        return Poisoned(self)

    def build_hooks(self) -> "Witness":
        return self

    def on_step_end(self, record: Any) -> None:
        with Path(self.directory, f"rank{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps([record.step, self.samples]) + "\n")
        if record.step == KILL_AFTER and dist.get_rank() == 1:
            with suppress(FileNotFoundError):
                Path(self.directory, "kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points()}


def fit_in(directory: Path) -> Path:
    witness = Witness(str(directory))
    training = TrainingConfig(
        epochs=2,
        batch_size=BATCH,
        shuffle=False,
        on_bad_data="quarantine",
        max_bad_ratio=0.1,
        on_bad_gradients="rollback",
        rollback_points_every_n_steps=4,
        save_every_n_steps=5,
        log_every_n_steps=1,
        tensorboard=False,
    )
    cluster = ClusterConfig(
        num_workers=NUM_WORKERS,
        name="poison",
        storage_path=str(directory),
        max_failures=3,
        resources_per_worker={"CPU": 0.5},
    )
    spec = TaskSpec("points", "tabular_classification", input_fields=["features"])
    fit(Experiment(witness.build_model, build_datasets, spec, build_hooks=witness.build_hooks), training, cluster)
    return directory / "poison"


def samples_by_step(directory: Path) -> dict[tuple[int, int], list[int]]:
    """What each rank did each step with; a step that was done twice was done with the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(NUM_WORKERS):
        for step, samples in whole_lines(directory / f"rank{rank}.jsonl"):
            assert found.setdefault((step, rank), samples) == samples
    return found


def test_poisoned_batches_and_a_death_before_a_rollback_end_as_a_run_that_never_had_them(tmp_path: Path) -> None:
    struck, spared = tmp_path / "struck", tmp_path / "spared"
    for directory in (struck, spared):
        directory.mkdir()
    (struck / "kill").touch()
    with ray_of_two_cpus():
        run_dir = fit_in(struck)
        failed = events(run_dir, "batch_failed")
        for event in failed:  # known from the start
            details = {name: value for name, value in event.items() if name not in ("time", "event", "attempt")}
            EventLog(Storage.open(spared / "poison"), 1).record("batch_failed", **details)
        whole = fit_in(spared)

    assert [(event["step"], event["rank"], event["samples"]) for event in failed] == [
        (3, 1, [14, 15]),
        (3, 1, [14, 15]),
        (6, 2, [34, 35]),
        (6, 2, [34, 35]),
    ]
    assert [event["error"] for event in failed] == ["ZeroDivisionError: sample 14"] * 2 + ["the process died"] * 2
    assert [event["samples"] for event in events(run_dir, "batch_quarantined")] == [[14, 15], [34, 35]]
    assert len((struck / "crashed").read_text().split()) == 2
    assert not (struck / "kill").exists()
    causes = [event["cause"] for event in events(run_dir, "failure")]
    assert [cause[: len("rank 0")] for cause in causes] == ["rank 1", "rank 1", "rank 2", "rank 2", "rank 1"]
    rolled = [(event["step"], event["to_step"], event["tier"]) for event in events(run_dir, "rolled_back")]
    assert rolled[:2] == [(11, 8, "storage"), (11, 8, "memory")]
    assert events(whole, "failure") == []
    assert [event["tier"] for event in events(whole, "rolled_back")] == ["memory"] * 2
    assert samples_by_step(struck) == samples_by_step(spared)
    assert_same_run(whole, run_dir)
