import math
import pickle

import pytest
import torch
from torch import nn

from ray_trainer.errors import DivergenceError
from ray_trainer.gradients import GradientMonitor, Verdict, check_gradient_health


def model_with_gradients(**gradients: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, gradient in gradients.items():
        parameter = nn.Parameter(torch.zeros(gradient.shape))
        parameter.grad = gradient
        model.register_parameter(name, parameter)
    return model


@pytest.mark.parametrize("bad", [math.nan, math.inf, 11.0])
def test_a_bad_norm_is_skipped_and_that_many_in_a_row_abort(bad):
    monitor = GradientMonitor(max_consecutive_failures=3, explosion_threshold=10.0)

    verdicts = [monitor.judge(norm) for norm in (1.0, bad, bad, 10.0, bad, bad, bad)]

    step, skip, abort = Verdict.STEP, Verdict.SKIP, Verdict.ABORT
    assert verdicts == [step, skip, skip, step, skip, skip, abort]
    assert monitor.total_failures == 5


def test_a_limit_of_one_aborts_at_the_first():
    assert GradientMonitor(max_consecutive_failures=1).judge(math.nan) is Verdict.ABORT


def test_while_fp16_searches_its_scale_an_infinite_norm_is_no_failure():
    monitor = GradientMonitor(max_consecutive_failures=1, explosion_threshold=10.0)

    assert monitor.judge(math.inf, is_searching_scale=True) is Verdict.SKIP
    assert monitor.consecutive_failures == 0
    assert monitor.judge(20.0, is_searching_scale=True) is Verdict.ABORT


def test_failures_in_a_row_are_counted_on_after_a_restart():
    before = GradientMonitor(max_consecutive_failures=2)
    before.judge(math.nan)
    after = GradientMonitor(max_consecutive_failures=2)

    after.load_state_dict(before.state_dict())

    assert after.judge(math.nan) is Verdict.ABORT


def test_the_error_names_layers_and_remedies_and_survives_pickling():
    monitor = GradientMonitor(max_consecutive_failures=1)
    monitor.judge(math.nan)
    findings = monitor.check_gradients(model_with_gradients(head=torch.tensor([math.nan])))

    error = pickle.loads(pickle.dumps(monitor.divergence(math.nan, findings)))

    assert isinstance(error, DivergenceError)
    assert "Training unstable: 1 consecutive gradient failure," in str(error)
    assert "head (NaN)" in str(error)
    assert "Remediation steps:" in str(error)


def test_a_scan_names_the_layers_with_nan_and_infinity():
    model = model_with_gradients(
        good=torch.tensor([3.0, 4.0]),
        nan=torch.tensor([math.nan, 1.0]),
        inf=torch.tensor([[math.inf]]),
        both=torch.tensor([math.nan, -math.inf]),
    )

    health = check_gradient_health(model)

    assert health.has_nan
    assert health.has_inf
    assert not health.is_healthy
    assert set(health.affected_layers) == {"nan (NaN)", "inf (Inf)", "both (NaN, Inf)"}
    assert math.isnan(health.max_norm)
    assert health.min_norm == 5.0


def test_a_scan_compares_finite_layers_with_the_thresholds():
    model = model_with_gradients(
        tiny=torch.tensor([1e-9]),
        zero=torch.zeros(2),
        plain=torch.ones(4),
        huge=torch.full((4,), 1e30),
    )
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))

    health = check_gradient_health(model, vanishing_threshold=1e-7, explosion_threshold=10.0)

    assert health.vanishing_layers == ("tiny",)
    assert health.exploding_layers == ("huge",)
    assert health.affected_layers == ()
    assert health.max_norm == pytest.approx(2e30, rel=1e-6)
    assert health.min_norm == pytest.approx(1e-9, rel=1e-6)


def test_sparse_half_and_empty_gradients_are_scanned_as_well():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    model = model_with_gradients(empty=torch.zeros(0))
    model.embedding = embedding
    half = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    half.grad = torch.ones(1, dtype=torch.bfloat16)
    model.register_parameter("bf16", half)

    health = check_gradient_health(model)

    assert health.is_healthy
    assert health.max_norm == pytest.approx(math.sqrt(8.0))
    assert health.min_norm == 1.0


def test_a_model_without_gradients_is_healthy():
    health = check_gradient_health(nn.Linear(2, 2), 1e-7, 10.0)

    assert health.is_healthy
    assert (health.max_norm, health.min_norm) == (0.0, 0.0)


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="max_consecutive_failures must be >= 1"):
        GradientMonitor(max_consecutive_failures=0)
    with pytest.raises(ValueError, match="explosion_threshold must be > 0 or None"):
        GradientMonitor(explosion_threshold=math.nan)
