"""With ``determinism: elastic`` a run ends with the same bits for any number of processes."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import assert_same, carry_out, prepare
from ranks import on_ranks
from torch import nn

from ray_trainer import TaskSpec, Trainer

SHARED = ("weights", "optimizer", "schedule", "history", "rows", "step")
TASK = TaskSpec("points", "tabular_classification", input_fields=["features"], metrics=["loss", "accuracy"])


class Moody(nn.Module):
    """Has what depends on the ranks by itself: noise, running statistics, a count, and layers that not all use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.first(features[:, 1:])
        if self.training:
            self.passes += 1
            if int(features[0, 0]) % 3 == 0:
                hidden = hidden + self.sometimes(hidden) + torch.randn(8)
        return self.last(hidden) + 0.01 * self.passes


def train(run_dir: Path, moody: bool, stop_after: int | None = None, **changes: Any) -> dict[str, Any] | None:
    """Four micro-batches of two samples a step, twenty samples, two epochs: six steps."""
    torch.manual_seed(5)
    prepared = prepare(
        run_dir,
        size=20 if moody else 19,
        gradient_accumulation_steps=1,
        global_batch_size=8,
        determinism="elastic",
        log_every_n_steps=1,
        **changes,
    )
    if moody:
        model = Moody()
        prepared.trainer = Trainer(model, SimpleNamespace(), prepared.trainer.training_config, TASK, prepared.diary)
        prepared.model = model
        model.seen = []
    if stop_after is not None and int(os.environ.get("RANK", "0")) == 0:
        prepared.diary.act("on_step_end", stop_after, lambda: os.kill(os.getpid(), 15))
    try:
        outcome = carry_out(prepared)
    except SystemExit:
        return None
    return {name: getattr(outcome, name) for name in SHARED}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "moody"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    (outcome,) = on_ranks(1, train, run_dir, request.param)
    return request.param, outcome


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_processes_ends_with_the_same_bits(tmp_path, alone, world_size):
    moody, expected = alone

    outcomes = on_ranks(world_size, train, tmp_path / "run", moody)

    for outcome in outcomes:
        assert_same(outcome, expected)
    assert expected["step"] == 6


def test_run_continued_by_more_and_by_fewer_processes_ends_with_the_same_bits(tmp_path, alone):
    moody, expected = alone

    for world_size, stop_after in ((2, 2), (3, 4)):
        assert on_ranks(world_size, train, tmp_path / "run", moody, stop_after) == [None] * world_size
    (outcome,) = on_ranks(1, train, tmp_path / "run", moody)

    assert_same(outcome, expected)
