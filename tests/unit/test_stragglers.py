"""Slow ranks, from the times by phase of all ranks."""

import torch

from ray_trainer.stragglers import MOST_NAMED, PERSISTENT_WINDOWS, WINDOW_STEPS, StragglerWatch, find_slow

USUAL = [0.010, 0.020, 0.005, 0.0]  # data, forward, update, hook
LONG_ENOUGH = WINDOW_STEPS * PERSISTENT_WINDOWS


def slow_in(phase: int, by: float) -> list[float]:
    return [time + by * (place == phase) for place, time in enumerate(USUAL)]


def feed(watch, ranks, steps, seconds=0.1):
    own = torch.tensor(ranks, dtype=torch.float64)
    return [straggler for _ in range(steps) for straggler in watch.add(own, seconds)]


def started() -> StragglerWatch:
    watch = StragglerWatch()
    feed(watch, [[9.0, 0.0, 0.0, 0.0], USUAL], 1)  # a first step may be anything
    return watch


def test_slow_rank_is_named_once_with_its_phase_and_ratio():
    watch, ranks = started(), [USUAL, slow_in(1, 0.035), USUAL]

    assert feed(watch, ranks, LONG_ENOUGH - 1) == []
    (found,) = feed(watch, ranks, 10 * LONG_ENOUGH)

    assert (found.rank, found.phase) == (1, "forward")
    assert abs(found.ratio - 2.0) < 1e-6
    assert abs(found.excess_s - 0.035) < 1e-6


def test_of_two_ranks_the_slow_one_is_named_and_not_the_other():
    (found,) = feed(started(), [slow_in(0, 0.035), USUAL], LONG_ENOUGH)

    assert (found.rank, found.phase) == (0, "data")


def test_rank_that_was_slow_for_a_while_is_not_named():
    watch = started()
    for _ in range(20):
        assert feed(watch, [USUAL, slow_in(2, 0.05)], LONG_ENOUGH - WINDOW_STEPS) == []
        assert feed(watch, [USUAL, USUAL], WINDOW_STEPS) == []


def test_rank_that_recovered_may_be_named_again_but_not_without_end():
    watch, num_named = started(), 0
    for _ in range(2 * MOST_NAMED):
        num_named += len(feed(watch, [USUAL, slow_in(3, 0.05)], LONG_ENOUGH))
        assert feed(watch, [USUAL, USUAL], LONG_ENOUGH) == []

    assert num_named == MOST_NAMED


def test_differences_that_do_not_matter_to_the_step_are_no_news():
    assert find_slow([[0.001] * 4, [0.003] * 4], seconds=1.0, steps=1) == {}
    assert find_slow([[0.1] * 4, [0.14] * 4], seconds=0.6, steps=1) == {}
    assert find_slow([[0.0] * 4, [0.0] * 4], seconds=1.0, steps=1) == {}
