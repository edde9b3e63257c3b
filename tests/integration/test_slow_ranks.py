"""A rank that is slower than the others, among processes that train together."""

import time
from pathlib import Path

from experiments import carry_out, events, prepare
from ranks import on_ranks

from ray_trainer import distributed

STEPS = 70


def train_with_a_slow_rank(run_dir: Path) -> int:
    never = {"early_stopping_patience": None, "save_every_n_epochs": None}
    prepared = prepare(run_dir, size=160, epochs=STEPS, max_steps=STEPS, **never)
    if distributed.rank() == 1:
        prepared.model.on_forward = lambda training: time.sleep(0.01 * training)
    return carry_out(prepared).step


def test_rank_that_is_slow_in_forward_is_named_once_in_the_events(tmp_path):
    assert on_ranks(2, train_with_a_slow_rank, tmp_path / "run") == [STEPS, STEPS]

    (straggler,) = events(tmp_path / "run", "straggler")
    assert (straggler["rank"], straggler["phase"]) == (1, "forward")
    assert straggler["ratio"] > 1.5
    assert straggler["excess_s"] > 0.015
