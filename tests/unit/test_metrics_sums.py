import math
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_trainer.errors import StateMismatchError
from ray_trainer.metrics import MetricSums

finite = st.floats(-1e6, 1e6)
rows_of_two = st.lists(st.tuples(finite, st.integers(0, 100)), max_size=20)


class Ranks:
    """As many threads as ranks, whose rows meet as those of processes do."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._rows = [torch.empty(0)] * world_size

    def run(self, work):
        results = [None] * len(self._rows)

        def on_rank(rank):
            results[rank] = work(rank, lambda rows: self._gather(rank, rows))

        threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(len(self._rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
        return results

    def _gather(self, rank, rows):
        self._rows[rank] = rows
        self._barrier.wait(timeout=5)
        gathered = torch.stack(self._rows)
        self._barrier.wait(timeout=5)
        return gathered


@given(rows=rows_of_two, flushes=st.sets(st.integers(0, 20)))
def test_totals_have_the_same_bits_wherever_they_are_flushed(rows, flushes):
    once, often = MetricSums(2), MetricSums(2)
    for place, (loss, count) in enumerate(rows):
        once.append((torch.tensor(loss), count))
        often.append((torch.tensor(loss), count))
        if place in flushes:
            often.flush()

    expected = [0.0, 0.0]
    for loss, count in rows:
        expected = [expected[0] + float(torch.tensor(loss)), expected[1] + count]
    assert often.epoch_steps <= len(rows)
    assert once.take_epoch() == often.take_epoch() == tuple(expected)


def test_an_interval_and_the_epoch_count_the_same_steps_independently():
    sums = MetricSums(1)
    for value in (1.0, 2.0):
        sums.append((value,))

    first = sums.take_interval()
    sums.append((4.0,))
    epoch = sums.take_epoch()
    sums.append((8.0,))

    assert (first, epoch) == ((3.0,), (7.0,))
    assert sums.take_interval() == (12.0,)
    assert sums.take_epoch() == (8.0,)
    assert sums.take_epoch() == (0.0,)


def test_ranks_are_added_in_their_order_and_all_know_the_total():
    values = [[0.1, 1e16, -0.3], [0.7, -1e16, 0.2], [0.2, 1.0, 1e-9]]

    def work(rank, gather):
        sums = MetricSums(1, gather)
        for value in values[rank]:
            sums.append((torch.tensor(value, dtype=torch.float64),))
        return sums.take_epoch()[0]

    totals = Ranks(3).run(work)

    expected = 0.0
    for per_step in zip(*values, strict=True):
        expected += (per_step[0] + per_step[1]) + per_step[2]
    assert totals == [expected] * 3


def test_float32_losses_and_counts_are_added_without_loss():
    sums = MetricSums(2)
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1000
    for loss in losses:
        sums.append((loss, torch.tensor(2**24 + 1)))

    total, count = sums.take_epoch()

    exact = sum(Fraction(float(loss)) for loss in losses)
    assert total == pytest.approx(float(exact), rel=1e-14)
    assert count == 1000 * (2**24 + 1)


def test_nan_and_infinity_pass_through():
    sums = MetricSums(3)
    sums.append((torch.tensor(math.nan), torch.tensor(math.inf), 1))
    sums.append((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(2)))

    nan, inf, three = sums.take_epoch()

    assert math.isnan(nan)
    assert (inf, three) == (math.inf, 3.0)


def test_a_state_in_the_middle_continues_to_the_same_totals():
    unbroken, before, after = MetricSums(1), MetricSums(1), MetricSums(1)
    values = [0.1, 0.2, 0.3, 1e9, -0.7]
    for value in values:
        unbroken.append((value,))
    for value in values[:3]:
        before.append((value,))
    before.flush()

    after.load_state_dict(before.state_dict())
    for value in values[3:]:
        after.append((value,))

    assert after.take_interval() == unbroken.take_interval()
    assert after.take_epoch() == unbroken.take_epoch()


def test_a_state_with_pending_steps_is_refused():
    sums = MetricSums(1)
    sums.append((1.0,))

    with pytest.raises(RuntimeError, match=r"1 steps are not in the totals\. Call flush\(\)"):
        sums.state_dict()


def test_a_state_of_other_metrics_is_refused():
    with pytest.raises(StateMismatchError, match="holds sums of 4 values a step, this run has 2"):
        MetricSums(2).load_state_dict(MetricSums(4).state_dict())


def test_loading_drops_steps_that_the_state_does_not_know():
    sums = MetricSums(1)
    state = sums.state_dict()
    sums.append((5.0,))

    sums.load_state_dict(state)
    sums.append((1.0,))

    assert sums.take_epoch() == (1.0,)
