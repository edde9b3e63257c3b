"""Snapshots in memory: next to nothing is repeated while they last, and their loss only costs time."""

import time

import numpy as np
import pytest
import torch
from experiments import assert_same, carry_out, events, prepare, run

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, MemoryTier
from ray_trainer.runtime import LocalRuntime

RARELY = {"save_every_n_epochs": None, "save_every_n_steps": 4}


class Killed(BaseException):
    """Passes everything that is done after an error, as a kill would."""


class Shelf:
    """A memory that outlives runs of this process."""

    def __init__(self, every_n_steps=5):
        self.every_n_steps = every_n_steps
        self.parts = []

    def put(self, part, content):
        self.parts = [(part, content.copy())]

    def newest(self):
        return [part for part, _ in self.parts]

    def content(self, part):
        return self.parts[0][1]

    def step(self):
        return self.parts[0][0].key[1] if self.parts else None


class Shelved(LocalRuntime):
    """One process beside such a memory."""

    def __init__(self, run_dir, shelf):
        super().__init__(str(run_dir))
        self._shelf = shelf

    @property
    def snapshots(self):
        return self._shelf


def train_until_killed(run_dir, step, every_n_steps=5, **changes):
    """A run that is killed after a step, once the snapshot before is where it belongs; returns what is left of it."""
    shelf = Shelf(every_n_steps)
    prepared = prepare(run_dir, runtime=Shelved(run_dir, shelf), **RARELY | changes)

    def die():
        deadline = time.monotonic() + 60
        while shelf.step() != step // every_n_steps * every_n_steps and time.monotonic() < deadline:
            time.sleep(0.001)
        raise Killed

    prepared.diary.act("on_step_end", step, die)
    with pytest.raises(Killed):
        carry_out(prepared)
    return shelf


def lose(shelf):
    shelf.parts = []


def flip_a_bit(shelf):
    shelf.parts[0][1][100] ^= 1


def lose_the_end(shelf):
    part, content = shelf.parts[0]
    shelf.parts = [(part, content[: len(content) // 2])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **RARELY)


@pytest.mark.parametrize(("killed_at", "source"), [(6, ("memory", 5)), (7, ("memory", 5)), (9, ("storage", 8))])
def test_killed_run_goes_on_from_whichever_is_newer_and_repeats_no_more_than_the_interval(
    tmp_path, whole, killed_at, source
):
    shelf = train_until_killed(tmp_path, killed_at)

    resumed = carry_out(prepare(tmp_path, runtime=Shelved(tmp_path, shelf), **RARELY))

    (event,) = events(tmp_path, "resumed")
    assert (event["tier"], event["step"]) == source
    assert killed_at - event["step"] <= shelf.every_n_steps
    assert_same(resumed, whole)


def test_rows_of_the_step_of_a_snapshot_stand_once_after_a_resume(tmp_path):
    changes = {"validate_every_n_steps": 3, "log_every_n_steps": 1}
    whole = run(tmp_path / "whole", **RARELY | changes)
    shelf = train_until_killed(tmp_path / "killed", 7, every_n_steps=3, **changes)

    resumed = carry_out(prepare(tmp_path / "killed", runtime=Shelved(tmp_path / "killed", shelf), **RARELY | changes))

    assert [event["step"] for event in events(tmp_path / "killed", "resumed")] == [6]
    assert_same(resumed, whole)


@pytest.mark.parametrize("damage", [lose, flip_a_bit, lose_the_end])
def test_snapshot_that_is_lost_or_altered_is_not_used_and_storage_is(tmp_path, whole, damage):
    shelf = train_until_killed(tmp_path, 7)
    damage(shelf)

    resumed = carry_out(prepare(tmp_path, runtime=Shelved(tmp_path, shelf), **RARELY))

    assert [(event["tier"], event["step"]) for event in events(tmp_path, "resumed")] == [("storage", 4)]
    assert_same(resumed, whole)


def test_state_that_can_not_be_stored_costs_the_snapshot_and_not_the_step(tmp_path, caplog):
    shelf = Shelf()
    tier = MemoryTier(shelf, CheckpointManager(tmp_path))

    tier.take({"model": {"w": torch.ones(2)}, "hooks": {"log": print}}, {}, CheckpointMeta(epoch=0, step=5))
    assert shelf.parts == []
    assert "hooks.log" in caplog.text

    tier.take({"model": {"w": torch.ones(2)}}, {}, CheckpointMeta(epoch=0, step=10))
    tier.close()
    assert shelf.step() == 10
    assert np.frombuffer(shelf.parts[0][1], dtype=np.uint8).size > 0
