"""Numbers that go wrong on one of several ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
from experiments import assert_same, carry_out, events, prepare
from ranks import on_ranks


def train(run_dir: Path, bad: list[int], changes: dict[str, Any]) -> dict[str, Any]:
    """Six steps an epoch of four samples each; the last sample of the bad ones, which is rank 1's, is no number."""
    prepared = prepare(run_dir, size=24, shuffle=False, gradient_accumulation_steps=1, **changes)
    for step in bad:
        prepared.train_set.features[4 * step - 1, 1] = math.nan
    outcome = carry_out(prepared)
    return {name: getattr(outcome, name) for name in ("weights", "optimizer", "schedule", "history", "step")}


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_ranks_roll_back_together_as_if_the_batches_had_never_been_there(tmp_path, parallelism):
    back = {"on_bad_gradients": "rollback", "rollback_points_every_n_steps": 2, "parallelism": parallelism}

    rolled = on_ranks(2, train, tmp_path / "back", [4], back | {"on_spike": "skip"})
    skipped = on_ranks(2, train, tmp_path / "skips", [3, 4], {"parallelism": parallelism})

    for one, other in zip(rolled, skipped, strict=True):
        assert_same(one["step"], 12)
        assert_same(one["history"], other["history"])
        if parallelism == "ddp":
            assert_same(one, other)
    assert [(event["first_skipped"], event["step"]) for event in events(tmp_path / "back", "rolled_back")] == [
        (3, 4),
        (9, 10),
    ]
