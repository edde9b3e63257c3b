"""200,000 rows of a Ray Dataset, and workers that die of SIGKILL: each step keeps its rows, on any number of them."""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from cluster_runs import assert_each_row_once, assert_same_run, newest_checkpoint, ray_of_two_cpus, tensors, whole_lines
from experiments import events
from torch import nn

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit
from ray_trainer.errors import RunError

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

NUM_ROWS, GLOBAL_BATCH, EPOCHS = 200_010, 2000, 2
STEPS_AN_EPOCH = 101  # the last one of ten rows
LAST_STEP = STEPS_AN_EPOCH * EPOCHS
SAVE_EVERY = 15
ROWS = TaskSpec("rows", "tabular_classification", input_fields=["id", "features"], metrics=["loss", "accuracy"])


@dataclass(frozen=True)
class Kill:
    """The process of a rank dies of SIGKILL, once, while or after it works on a step."""

    rank: int
    step: int
    within: bool


def seeded_kills(seed: int, ranks: list[int]) -> tuple[Kill, ...]:
    """One for each of the ranks, far enough from each other that a checkpoint lies between them."""
    draw = random.Random(seed)
    part = (LAST_STEP - 40) // len(ranks)
    return tuple(
        Kill(rank, 20 + number * part + draw.randrange(SAVE_EVERY + 1, part), draw.random() < 0.5)
        for number, rank in enumerate(ranks)
    )


class Network(nn.Module):
    """Two layers; tells of each forward pass in training."""

    def __init__(self, witness: "Witness") -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        self.witness = witness

    def forward(self, id: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.witness.saw(id.tolist())
        return self.layers(features)


class Witness(DefaultHooks):
    """Writes down which rows each step of each rank was made of, and carries the kills out."""

    def __init__(self, directory: Path, kills: tuple[Kill, ...]) -> None:
        self.directory = directory
        self.kills = kills
        self.step = 0
        self.rows: list[int] = []

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        return Network(self)

    def build_hooks(self) -> "Witness":
        return self

    def on_resume(self, record: Any) -> None:
        self.step = record.step

    def on_training_start(self) -> None:
        self.rows = []

    def saw(self, rows: list[int]) -> None:
        self.rows += rows
        self.die_if_planned(self.step + 1, within=True)

    def on_step_end(self, record: Any) -> None:
        line = [record.epoch, record.step, world_size(), rank(), self.rows]
        with (self.directory / f"rank{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.step, self.rows = record.step, []
        self.die_if_planned(record.step, within=False)

    def die_if_planned(self, step: int, within: bool) -> None:
        if Kill(rank(), step, within) in self.kills:
            fired = self.directory / f"killed at {step}"
            if not fired.exists():
                fired.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    def features(batch: dict[str, Any]) -> dict[str, Any]:
        values = np.stack([np.sin(batch["id"] * factor) for factor in (1, 2, 3, 5)], axis=1)
        labels = (values[:, :2] > 0).sum(axis=1)
        return {"id": batch["id"], "features": values.astype(np.float32), "labels": labels}

    return {"train": ray.data.range(NUM_ROWS, override_num_blocks=12).map_batches(features)}


@dataclass(frozen=True)
class Run:
    """A run under way, or what it left."""

    directory: Path
    kills: tuple[Kill, ...] = ()

    @property
    def run_dir(self) -> Path:
        return self.directory / "rows"

    def go_on(self, num_workers: int, max_failures: int = 0, in_place: bool = False) -> None:
        """One call of `fit`."""
        witness = Witness(self.directory, self.kills)
        training = TrainingConfig(
            epochs=EPOCHS,
            batch_size=GLOBAL_BATCH // 2,
            global_batch_size=GLOBAL_BATCH,
            learning_rate=0.01,
            save_every_n_epochs=None,
            save_every_n_steps=SAVE_EVERY,
            log_every_n_steps=1,
            tensorboard=False,
        )
        fit(
            Experiment(witness.build_model, build_datasets, ROWS, build_hooks=witness.build_hooks),
            training,
            ClusterConfig(
                num_workers,
                name="rows",
                storage_path=str(self.directory),
                max_failures=max_failures,
                in_job_recovery=in_place,
            ),
        )

    def written(self) -> Iterator[tuple[int, int, int, int, list[int]]]:
        """Epoch, step, number of workers, rank and rows, of each step that a rank completed."""
        for path in self.directory.glob("rank*.jsonl"):
            yield from map(tuple, whole_lines(path))

    def assert_killed_as_planned(self, in_place: bool = False) -> None:
        fired = sorted(int(path.name.split()[-1]) for path in self.directory.glob("killed at *"))
        assert fired == [kill.step for kill in self.kills]
        causes = [event["cause"] for event in events(self.run_dir, "failure")]
        assert len(causes) == len(fired)
        for kill, cause in zip(self.kills, causes, strict=True):
            assert f"rank {kill.rank}: the worker process died" in cause
        resumed = [event["step"] for event in events(self.run_dir, "resumed")]
        assert [kill.step - step for kill, step in zip(self.kills, resumed, strict=True)] == [
            kill.within + (0 if in_place else (kill.step - kill.within) % SAVE_EVERY) for kill in self.kills
        ]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_of_two_cpus():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    run.go_on(num_workers=2)
    return run


@pytest.fixture(scope="module")
def order(undisturbed: Run) -> dict[int, list[int]]:
    """The rows of each step of the undisturbed run, those of rank 0 first."""
    rows: dict[int, list[int]] = {}
    for *_, step, _, _, part in sorted(undisturbed.written(), key=lambda line: line[3]):
        rows.setdefault(step, []).extend(part)
    return rows


def assert_rows_of(run: Run, order: dict[int, list[int]]) -> None:
    """Whatever was done, also what was done twice, was done with the rank's part of the rows of that step."""
    ranks: dict[tuple[int, int], set[int]] = {}
    for _, step, num_workers, number, rows in run.written():
        assert rows == np.array_split(order[step], num_workers)[number].tolist(), f"rank {number} at step {step}"
        ranks.setdefault((step, num_workers), set()).add(number)
    whole = {step for (step, num_workers), there in ranks.items() if len(there) == num_workers}
    assert whole == set(range(1, LAST_STEP + 1))


def test_each_epoch_uses_each_row_once_and_has_an_order_of_its_own(undisturbed, order):
    assert sorted(order) == list(range(1, LAST_STEP + 1))
    first, second = (
        [row for step in range(start + 1, start + STEPS_AN_EPOCH + 1) for row in order[step]]
        for start in (0, STEPS_AN_EPOCH)
    )
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS))
    assert first != second
    assert {len(order[step]) for step in range(1, STEPS_AN_EPOCH)} == {GLOBAL_BATCH}
    assert {epoch for epoch, step, *_ in undisturbed.written() if step <= STEPS_AN_EPOCH} == {0}


@pytest.mark.parametrize("in_place", [False, True])
def test_run_whose_workers_were_killed_uses_the_same_rows_and_ends_with_the_same_bits(
    undisturbed, order, tmp_path, in_place
):
    run = Run(tmp_path, seeded_kills(seed=1, ranks=[0, 1]))

    run.go_on(num_workers=2, max_failures=3, in_place=in_place)

    run.assert_killed_as_planned(in_place)
    assert_rows_of(run, order)
    assert not in_place or len(list(run.written())) == 2 * LAST_STEP  # nothing was done twice
    assert_same_run(undisturbed.run_dir, run.run_dir)


def test_run_that_goes_on_with_fewer_workers_and_with_more_again_uses_the_same_rows(undisturbed, order, tmp_path):
    run = Run(tmp_path, seeded_kills(seed=2, ranks=[1, 0]))

    for num_workers in (2, 1):
        with pytest.raises(RunError, match="worker process died"):
            run.go_on(num_workers)
    run.go_on(num_workers=2)

    run.assert_killed_as_planned()
    assert {num_workers for _, _, num_workers, _, _ in run.written()} == {1, 2}
    assert_rows_of(run, order)
    assert_each_row_once(run.run_dir)
    torch.testing.assert_close(
        tensors(newest_checkpoint(run.run_dir)), tensors(newest_checkpoint(undisturbed.run_dir)), rtol=1e-4, atol=1e-5
    )
