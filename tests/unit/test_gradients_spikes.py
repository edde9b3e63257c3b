import json
import math
import random

import numpy as np
import pytest
import torch

from ray_trainer.gradients import GradientAccumulator, GradientMonitor, Policy, SpikeDetector, Verdict


def filled(threshold=8.0, window=50, seed=0):
    detector = SpikeDetector(threshold, window)
    draw = random.Random(seed)
    values = [(draw.lognormvariate(0, 0.3), draw.gauss(2.5, 0.2)) for _ in range(window + 20)]
    for norm, loss in values:
        detector.accept(norm, loss)
    return detector, values[-window:]


@pytest.mark.parametrize("place", [0, 1])
def test_limit_is_that_of_median_and_median_absolute_deviation(place):
    detector, values = filled()
    column = np.array([value[place] for value in values])
    limit = np.median(column) + 8 * 1.4826 * np.median(np.abs(column - np.median(column)))

    def find(value):
        norm, loss = (value, 2.5) if place == 0 else (1.0, value)
        return detector.find(norm, loss)

    assert find(limit - 1e-9) is None
    assert f"{('gradient norm', 'loss')[place]} {limit + 1e-9:.4g} where" in find(limit + 1e-9)


def test_nothing_is_a_spike_before_there_is_enough_to_compare_with():
    detector = SpikeDetector(window=8)
    for _ in range(7):
        detector.accept(1.0, 1.0)
    assert detector.find(1e9, 1e9) is None

    detector.accept(1.0, 1.0)

    assert detector.find(1e9, 1.0)
    assert detector.find(1.39, 1.39) is None  # values that never vary count as if they varied by 5 %
    assert detector.find(1.41, 1.0)


def test_ten_thousand_ordinary_steps_have_no_spike():
    detector, draw = SpikeDetector(), random.Random(1)
    for step in range(10_000):
        loss = 2 + 8 * math.exp(-step / 800) + draw.gauss(0, 0.1)
        norm = (0.5 + 5 * math.exp(-step / 500)) * draw.lognormvariate(0, 0.35)
        assert detector.find(norm, loss) is None, step
        detector.accept(norm, loss)


def test_losses_may_be_negative():
    detector = SpikeDetector(window=8)
    for loss in (-5.0, -5.1, -5.2, -4.9, -5.0, -5.1, -4.8, -5.0):
        detector.accept(1.0, loss)

    assert detector.find(1.0, -6.0) is None
    assert detector.find(1.0, -2.0)


def test_state_comes_back_exactly():
    detector, _ = filled()
    after = SpikeDetector(8.0, 50)

    after.load_state_dict(json.loads(json.dumps(detector.state_dict())))

    assert after.state_dict() == detector.state_dict()


@pytest.mark.parametrize(
    ("action", "verdict"), [("skip", Verdict.SKIP), ("rollback", Verdict.ROLLBACK), ("raise", Verdict.ABORT)]
)
def test_policy_decides_what_a_spike_and_what_a_bad_norm_leads_to(action, verdict):
    for_spikes = GradientMonitor(policy=Policy("skip", action), spikes=SpikeDetector(window=8))
    for _ in range(8):
        assert for_spikes.judge(1.0, loss=2.0) is Verdict.STEP
    for_norms = GradientMonitor(policy=Policy(action))

    assert for_spikes.judge(1.0, loss=20.0) is verdict
    assert for_spikes.finding == "loss 20 where 2 is usual"
    assert for_norms.judge(math.nan) is verdict
    assert for_norms.judge(1e9) is Verdict.STEP


def test_a_spike_is_nothing_that_later_steps_are_compared_with():
    monitor = GradientMonitor(max_consecutive_failures=99, policy=Policy(on_spike="skip"), spikes=SpikeDetector(8, 8))
    for _ in range(8):
        monitor.judge(1.0, loss=2.0)

    assert [monitor.judge(1.0, loss=20.0) for _ in range(20)] == [Verdict.SKIP] * 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_shows_in_the_norm_though_its_gradients_are_finite(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    accumulator = GradientAccumulator(torch.optim.SGD([weight], lr=1.0))

    accumulator.backward(weight.sum() + bad)

    assert math.isnan(float(accumulator.norm(1.0)))


def test_a_finite_loss_leaves_the_gradients_to_the_bit():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    accumulator = GradientAccumulator(torch.optim.SGD([weight], lr=1.0))

    accumulator.backward((weight * 1e30).sum())

    assert torch.equal(weight.grad, torch.full((50,), 1e30))
