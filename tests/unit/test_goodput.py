"""Goodput against sums done by hand."""

import random

import pytest

from ray_trainer.metrics.goodput import Goodput, goodput


def started(time, attempt=1, step=0):
    return {"time": time, "event": "workers_started", "attempt": attempt, "step": step}


def saved(time, step, stall_s=0.0):
    return {"time": time, "event": "checkpoint_saved", "step": step, "stall_s": stall_s}


def event(time, name):
    return {"time": time, "event": name}


def test_undisturbed_run_loses_checkpoints_only():
    spent = goodput([started(100), saved(150, 10, 2.0), saved(200, 20, 3.0), event(200, "run_finished")])

    assert spent == Goodput(useful_s=95, checkpoint_s=5)
    assert spent.ratio == 0.95


def test_failure_loses_the_steps_after_the_checkpoint_and_the_time_without_workers():
    events = [
        *(started(100), saved(140, 40, 1.0), saved(160, 60, 1.0), event(175, "failure")),
        *(started(183, attempt=2, step=60), saved(223, 100, 1.0), event(223, "run_finished")),
    ]

    spent = goodput(events)

    assert spent == Goodput(useful_s=58 + 39, checkpoint_s=3, lost_s=15, down_s=8)
    assert spent.total_s == 123


def test_attempt_that_went_on_from_an_older_checkpoint_loses_the_newer_one_as_well():
    events = [started(0), saved(40, 40, 1.0), saved(60, 60, 1.0), event(75, "failure"), started(80, 2, step=40)]

    assert goodput(events, until=100) == Goodput(useful_s=39 + 20, checkpoint_s=1, lost_s=35, down_s=5)


def test_attempt_that_saved_nothing_is_lost_whole():
    spent = goodput([started(0), event(30, "failure"), started(40, 2), event(41, "failure"), started(50, 3)], until=60)

    assert spent == Goodput(useful_s=10, lost_s=31, down_s=19)


def test_pause_that_somebody_wanted_is_not_held_against_the_run():
    events = [started(0), saved(50, 5), event(50, "interrupted"), started(1000, 2, step=5)]

    spent = goodput(events, until=1050)

    assert (spent.ratio, spent.paused_s) == (1.0, 950)


def test_run_without_events_has_no_ratio():
    assert goodput([]).ratio is None


def test_order_of_the_events_does_not_matter():
    events = [started(0), saved(40, 40, 1.0), event(75, "failure"), started(80, 2, step=40), saved(90, 60, 0.5)]
    whole = goodput(events)

    for seed in range(5):
        random.Random(seed).shuffle(events)
        assert goodput(events) == whole


def test_later_is_as_if_it_had_been_accounted_for():
    events = [started(0), saved(40, 40, 1.0), event(75, "failure"), started(80, 2, step=40)]
    afterwards = [*events, saved(110, 70, 2.0)]

    assert goodput(events).later(30, checkpoint_s=2.0).ratio == pytest.approx(goodput(afterwards).ratio)
