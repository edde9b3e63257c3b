"""What a process keeps of a run that broke, and what its journal and its sums must have for that."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import Carried, CheckpointManager, CheckpointMeta, SurvivorTier, Tier
from ray_trainer.journal import Journal, RecentRows
from ray_trainer.loop import RunningStatistics
from ray_trainer.metrics import MetricSums
from ray_trainer.runtime import LocalRuntime
from ray_trainer.storage.snapshots import ProcessMemory

from experiments import assert_same, metric_rows, settings  # isort: skip

steps_of_rows = st.lists(st.integers(0, 30), max_size=40).map(sorted)


@given(steps=steps_of_rows, most=st.integers(1, 10))
def test_recent_rows_are_all_of_a_step_or_none(steps, most):
    recent = RecentRows(most)
    for place, step in enumerate(steps):
        recent.add({"step": step, "place": place})

    kept = recent.rows()

    assert [row["place"] for row in kept] == list(range(len(steps) - len(kept), len(steps)))
    assert {row["step"] for row in kept}.isdisjoint(steps[: len(steps) - len(kept)])
    assert len(kept) <= most or len({row["step"] for row in kept}) == 1


def test_rows_of_the_newest_step_stay_when_the_others_are_on_storage():
    recent = RecentRows(10)
    for step, split in [(4, "train"), (8, "train"), (8, "val")]:
        recent.add({"step": step, "split": split})

    recent.forget_but_newest_step()

    assert [(row["step"], row["split"]) for row in recent.rows()] == [(8, "train"), (8, "val")]


def test_rows_of_steps_that_come_again_are_forgotten():
    recent = RecentRows(10)
    for step in (8, 9, 10):
        recent.add({"step": step})

    recent.forget_after(8)
    recent.add({"step": 9})

    assert [row["step"] for row in recent.rows()] == [8, 9]


@given(rows=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), max_size=20))
def test_sums_that_come_with_each_step_have_the_bits_of_those_that_are_gathered_later(rows):
    later = MetricSums(1, gather=lambda mine: torch.stack([mine, others]))
    others = torch.tensor([[second] for _, second in rows], dtype=torch.float64)
    at_once = MetricSums(1)
    for first, second in rows:
        later.append((first,))
        at_once.add([first + second])

    later.flush()

    assert at_once.state_dict() == later.state_dict()


class Surviving(LocalRuntime):
    """One process that keeps what it was at."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(run_dir)
        self._survivor = ProcessMemory()

    @property
    def survivor(self) -> ProcessMemory:
        return self._survivor


def journal_with(runtime, saved, rows):
    journal = Journal(runtime, settings(runtime.storage.path))
    journal.open(saved)
    for step in rows:
        journal.metrics("train", step, 0, {"loss": float(step)})
    return journal


def kept(tmp_path, runtime, step, rows, **changes):
    """What comes back of a state that was kept."""
    carried = Carried(**({"rows": rows, "saved_step": -1, "saved_at_s": 0.0, "owes_save": False} | changes))
    tier = SurvivorTier(runtime.survivor)
    state = {"model": {"w": torch.arange(6.0)}, "progress": {"step": step}, "hooks": {"seen": [step]}}
    tier.keep(state, {"hooks": {"seen": [step]}}, CheckpointMeta(0, step), carried, CheckpointManager(tmp_path))
    state["model"]["w"] += 1  # what was kept is a copy
    return tier.restore()


def test_kept_state_comes_back_as_a_checkpoint_would(tmp_path):
    loaded = kept(tmp_path, Surviving(str(tmp_path)), 7, (), saved_at_s=2.5, owes_save=True)

    assert loaded.tier is Tier.SURVIVOR
    assert loaded.record.step == loaded.manifest.step == 7
    assert_same(loaded.state["model"], {"w": torch.arange(6.0)})
    assert loaded.rank_state == {"hooks": {"seen": [7]}}
    assert (loaded.carried.saved_at_s, loaded.carried.owes_save) == (2.5, True)


def test_altered_memory_is_not_used_and_the_next_source_is_asked(tmp_path):
    runtime = Surviving(str(tmp_path))
    kept(tmp_path, runtime, 7, ())
    runtime.survivor.kept.content[3] ^= 1

    assert SurvivorTier(runtime.survivor).restore() is None
    assert runtime.survivor.kept is None


def test_rows_that_a_lost_rank_0_did_not_write_are_written_and_the_others_stand_once(tmp_path):
    runtime = Surviving(str(tmp_path))
    survivor = journal_with(runtime, None, [1, 2, 3, 4]).recent_rows()
    (tmp_path / "metrics.jsonl").write_text(
        "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
        + '{"step": 9, "split": "train"}\n'
    )

    journal_with(runtime, kept(tmp_path, runtime, 4, survivor[1:]), [5]).close()

    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 2, 3, 4, 5]


class Counting(nn.Module):
    """Has statistics, and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.norm(batch)


@pytest.mark.parametrize("num_steps", [0, 2])
def test_step_that_is_broken_off_is_undone_in_every_buffer(num_steps):
    model = Counting()
    statistics = RunningStatistics(model, keeps_others=True)
    for _ in range(num_steps):
        statistics.remember()
        model(torch.randn(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    statistics.remember()
    model(torch.randn(4, 3))
    statistics.undo()

    assert statistics.are_complete()
    assert_same(dict(model.state_dict()), before)


def test_buffer_that_is_written_without_a_trace_is_undone_as_well():
    model = Counting()
    statistics = RunningStatistics(model, keeps_others=True)
    for _ in range(2):
        statistics.remember()
        model.passes.data.add_(1)  # its version stays what it was

    statistics.undo()

    assert statistics.are_complete()
    assert model.passes == 1


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("[/w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39830.", True),
        ("[/w/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation", True),
        ("mat1 and mat2 shapes cannot be multiplied (16x5 and 6x8)", False),
    ],
)
def test_lost_rank_is_told_from_an_error_of_the_users_code(message, is_lost):
    wrapped = ValueError("in a hook")
    wrapped.__cause__ = RuntimeError(message)

    assert distributed.has_lost_peer(RuntimeError(message)) is is_lost
    assert distributed.has_lost_peer(wrapped) is is_lost
    assert not distributed.has_lost_peer(OSError(message))
