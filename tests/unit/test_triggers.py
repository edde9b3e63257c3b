"""How often checkpoints are written where a budget or a rate of failures says it, and tried again where they fail."""

import numpy as np
import pytest
from experiments import events, run

from ray_trainer.triggers import AffordableInterval, Backoff, Moment


def moment(idle_s: float, step: int = 1) -> Moment:
    return Moment(step=step, epoch=0, is_epoch_end=False, idle_s=idle_s)


@pytest.mark.parametrize(("cost_s", "budget"), [(0.2, 0.01), (3.0, 0.05), (0.01, 0.001)])
def test_checkpoints_cost_no_more_of_a_long_run_than_the_budget(cost_s, budget):
    trigger = AffordableInterval(budget)
    now_s, saved_at_s, costs_s = 0.0, 0.0, 0.0
    while now_s < 20_000:
        now_s += 0.5  # a step
        if trigger.due(moment(now_s - saved_at_s)):
            saved_at_s = now_s
            now_s += cost_s
            costs_s += cost_s
            trigger.learn(cost_s, num_failures=0, elapsed_s=now_s)

    assert 0.8 * budget < costs_s / now_s < 1.05 * budget


@pytest.mark.parametrize(("cost_s", "failures", "elapsed_s"), [(2.0, 3, 36_000.0), (0.1, 40, 4_000.0)])
def test_once_a_run_has_failed_the_interval_is_the_one_that_loses_the_least_time(cost_s, failures, elapsed_s):
    """Looked for among all: a checkpoint costs its time, a failure half an interval on average."""
    trigger = AffordableInterval(budget=0.01)
    trigger.learn(cost_s, failures, elapsed_s)

    intervals = np.geomspace(cost_s, elapsed_s, 100_000)
    lost = cost_s / intervals + intervals / 2 * failures / elapsed_s
    assert trigger.interval_s == pytest.approx(intervals[lost.argmin()], rel=1e-2)  # the minimum is flat


def test_nothing_is_due_before_the_first_step_nor_right_after_a_checkpoint():
    trigger = AffordableInterval(0.01)

    assert not trigger.due(moment(1e9, step=0))
    assert not trigger.due(moment(59.9))
    assert trigger.due(moment(60.0))


@pytest.mark.parametrize(("budget", "steps"), [(1e-9, [1, 10]), (None, [10])])
def test_run_with_an_automatic_interval_saves_as_the_measured_cost_allows(tmp_path, monkeypatch, budget, steps):
    if budget is not None:
        monkeypatch.setattr(AffordableInterval, "FIRST_S", 0.0)
    run(tmp_path, save_every_n_epochs=None, save_interval="auto", save_budget=budget or 0.01)

    assert [row["step"] for row in events(tmp_path, "checkpoint_saved")] == steps


def test_pause_before_the_next_attempt_doubles_up_to_a_limit_and_begins_anew_after_success():
    backoff = Backoff()
    pauses = []
    for _ in range(9):
        backoff.fail(now_s=1000.0)
        pauses.append(next(pause for pause in range(1000) if backoff.due(1000.0 + pause)))
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]

    backoff.begin()
    assert not backoff.due(1e9)
    assert backoff.failures == 9

    backoff.succeed()
    backoff.fail(now_s=0.0)
    assert (backoff.failures, backoff.due(4.9), backoff.due(5.0)) == (1, False, True)
