"""A wall clock that is set while a run is on: times that are told may be wrong, and nothing else."""

import time
from pathlib import Path
from random import Random

import pytest
from experiments import assert_same, carry_out, events, prepare, run

from ray_trainer.metrics import EventLog, read_events
from ray_trainer.metrics.goodput import goodput
from ray_trainer.metrics.writers import JsonlWriter
from ray_trainer.storage import Storage

HOUR_S = 3600.0


def test_clock_that_jumps_by_an_hour_changes_nothing_and_makes_no_duration_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    real, chance = time.time, Random(0)
    jumps = False

    def now() -> float:
        """From some step on back or forth by an hour at each reading."""
        return real() + (HOUR_S * chance.choice((-1, 0, 1)) if jumps else 0.0)

    def begin() -> None:
        nonlocal jumps
        jumps = True

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(EventLog.__init__, "__defaults__", ("", now))
    monkeypatch.setattr(JsonlWriter.__init__, "__defaults__", (now,))
    prepared = prepare(tmp_path / "set")
    prepared.diary.act("on_step_end", 4, begin)
    struck = carry_out(prepared)

    assert_same(struck, whole)
    saved = events(tmp_path / "set", "checkpoint_saved")
    times = [event["time"] for event in read_events(Storage.open(tmp_path / "set"))]
    assert max(times) - min(times) > HOUR_S / 2  # it jumped
    assert all(0 <= event[name] < HOUR_S / 2 for event in saved for name in ("stall_s", "durable_s"))
    assert min(vars(goodput(read_events(Storage.open(tmp_path / "set")))).values()) >= 0
