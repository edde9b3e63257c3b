import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ray_trainer.gradients import GradientAccumulator

TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}  # float32 sums in another order


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 8, generator=generator)
    return inputs, torch.randint(4, (num_samples,), generator=generator)


def loss_sum(model, inputs, labels):
    return F.cross_entropy(model(inputs), labels, reduction="sum")


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def step(accumulator, model, inputs, labels, cuts=()):
    for part, targets in zip(inputs.tensor_split(cuts), labels.tensor_split(cuts), strict=True):
        accumulator.backward(loss_sum(model, part, targets))
    norm = accumulator.norm(float(len(inputs)))
    return norm, accumulator.apply(float(len(inputs)), norm)


@pytest.mark.parametrize("cuts", [(), (4, 8, 12), (1, 2, 13)], ids=["one", "even", "uneven"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_any_micro_batches_make_the_update_of_a_hand_written_large_batch(cuts, max_grad_norm):
    model, by_hand = mlp(), mlp()
    inputs, labels = batch(16)
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.5), 4, max_grad_norm)

    norm, updated = step(accumulator, model, inputs, labels, cuts)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    F.cross_entropy(by_hand(inputs), labels).backward()
    expected_norm = nn.utils.clip_grad_norm_(by_hand.parameters(), max_grad_norm or float("inf"))
    optimizer.step()
    assert updated
    torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close(parameters_of(model), parameters_of(by_hand), **TOLERANCE)


def test_an_update_zeroes_gradients_and_advances_the_schedule():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accumulator = GradientAccumulator(optimizer, scheduler=schedule)

    step(accumulator, model, *batch(4))

    assert all(parameter.grad is None for parameter in model.parameters())
    assert accumulator.learning_rate == 0.5
    assert accumulator.stats.optimizer_steps == 1
    assert accumulator.stats.micro_batches == 1


def test_a_discarded_step_leaves_weights_optimizer_and_schedule_as_they_were():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accumulator = GradientAccumulator(optimizer, scheduler=schedule)
    before = parameters_of(model)

    accumulator.backward(loss_sum(model, *batch(4)))
    accumulator.norm(4.0)
    accumulator.discard()

    assert all(torch.equal(old, new) for old, new in zip(before, parameters_of(model), strict=True))
    assert not optimizer.state
    assert accumulator.learning_rate == 1.0
    assert accumulator.stats.skipped_steps == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_broken_off_before_its_norm_counts_as_nothing():
    model = mlp()
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=1.0))

    accumulator.backward(loss_sum(model, *batch(4)))
    accumulator.discard()

    assert accumulator.stats.skipped_steps == accumulator.stats.micro_batches == 0


def test_a_total_count_of_zero_is_a_skip():
    model = mlp()
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=1.0))
    before = parameters_of(model)

    accumulator.backward(loss_sum(model, *batch(4)) * 0.0)
    updated = accumulator.apply(0.0, accumulator.norm(0.0))

    assert not updated
    assert all(torch.equal(old, new) for old, new in zip(before, parameters_of(model), strict=True))


def test_a_factor_of_one_leaves_the_bits_of_the_gradient():
    model, by_hand = mlp(), mlp()
    inputs, labels = batch(1)
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1e9)

    step(accumulator, model, inputs, labels)

    loss_sum(by_hand, inputs, labels).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(by_hand), strict=True))


def test_unused_parameters_and_parameters_added_later_are_handled():
    model, unused, late = mlp(), nn.Linear(3, 3), nn.Linear(8, 4)
    optimizer = torch.optim.SGD([*model.parameters(), *unused.parameters()], lr=0.1)
    accumulator = GradientAccumulator(optimizer)
    optimizer.add_param_group({"params": list(late.parameters())})
    inputs, labels = batch(4)
    before = parameters_of(late)

    accumulator.backward(loss_sum(lambda x: model(x) + late(x), inputs, labels))
    updated = accumulator.apply(4.0, accumulator.norm(4.0))

    assert updated
    assert unused.weight.grad is None
    assert not torch.equal(before[0], late.weight)
    assert late.weight.grad is None


def test_applying_with_another_count_than_the_norm_is_refused():
    model = mlp()
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1))
    accumulator.backward(loss_sum(model, *batch(4)))
    norm = accumulator.norm(4.0)

    with pytest.raises(RuntimeError, match=r"total_count 5\.0, norm\(\) before it 4\.0"):
        accumulator.apply(5.0, norm)


def test_sparse_gradients_have_the_norm_and_update_of_dense_ones():
    torch.manual_seed(0)
    dense = nn.Embedding(10, 4)
    sparse = nn.Embedding(10, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    norms = []
    for embedding in (dense, sparse):
        accumulator = GradientAccumulator(torch.optim.SGD(embedding.parameters(), lr=0.1), max_grad_norm=0.1)
        accumulator.backward(embedding(torch.tensor([1, 1, 7])).pow(2).sum())
        norms.append(accumulator.norm(3.0))
        accumulator.apply(3.0, norms[-1])

    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(dense.weight, sparse.weight)


def test_gradients_of_several_types_have_one_norm_and_half_precision_is_added_up_in_float32():
    values = [torch.full((1000,), 0.1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()
    accumulator = GradientAccumulator(torch.optim.SGD(parameters, lr=1.0), max_grad_norm=None)

    norm = accumulator.norm(1.0)

    expected = torch.cat([value.double() for value in values]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)  # added up in float32


def test_state_goes_on_counting_and_drops_gradients_of_a_broken_off_step():
    model = mlp()
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1))
    norm, _ = step(accumulator, model, *batch(4), cuts=(2,))
    state = copy.deepcopy(accumulator.state_dict())

    accumulator.backward(loss_sum(model, *batch(4)))
    accumulator.load_state_dict(state)

    assert all(parameter.grad is None for parameter in model.parameters())
    assert accumulator.stats.micro_batches == 2
    assert accumulator.stats.last_grad_norm == float(norm)
    assert accumulator.state_dict() == state


def test_an_fp16_scaler_makes_the_same_update_and_survives_a_restart():
    model, by_hand = mlp(), mlp()
    inputs, labels = batch(16)
    scaler = torch.amp.GradScaler("cpu")
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.5), scaler=scaler)

    for _ in range(2):
        norm, updated = step(accumulator, model, inputs, labels, cuts=(4, 7))
        assert updated
    again = GradientAccumulator(
        torch.optim.SGD(model.parameters(), lr=0.5), scaler=torch.amp.GradScaler("cpu", init_scale=2.0)
    )
    again.load_state_dict(accumulator.state_dict())

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(by_hand(inputs), labels).backward()
        expected = nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(parameters_of(model), parameters_of(by_hand), **TOLERANCE)
    assert again.state_dict() == accumulator.state_dict()
    assert accumulator.state_dict()["scaler"]["loss_divisor"] == 16.0


def test_fp16_sums_over_many_tokens_do_not_overflow_at_the_start():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    accumulator = GradientAccumulator(torch.optim.SGD([weight], lr=0.0), scaler=torch.amp.GradScaler("cpu"))
    accumulator._scaler._unscale_grads_ = _unscaling_fp16(accumulator._scaler)  # torch allows fp32 weights only

    tokens = torch.full((4096,), 0.5, dtype=torch.float16)  # each with a gradient of 0.5

    for _ in range(3):
        accumulator.backward((weight * tokens).float().sum())
        norm = accumulator.norm(4096.0)
        assert float(norm) == 0.5
        assert accumulator.apply(4096.0, norm)


def _unscaling_fp16(scaler):
    original = scaler._unscale_grads_
    return lambda optimizer, inverse, found, allow: original(optimizer, inverse, found, True)


def test_an_overflow_of_the_loss_scale_is_a_skip_that_lowers_the_scale():
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.5), scaler=scaler)

    accumulator.backward(loss_sum(model, *batch(4)) * float("inf"))
    norm = accumulator.norm(4.0)
    assert accumulator.is_searching_scale
    accumulator.discard()

    assert not torch.isfinite(norm)
    assert scaler.get_scale() == 2.0
    assert accumulator.stats.skipped_steps == 1
    assert step(accumulator, model, *batch(4))[1]


def test_an_update_that_the_scaler_refuses_is_not_counted_and_does_not_advance_the_schedule():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accumulator = GradientAccumulator(optimizer, scaler=torch.amp.GradScaler("cpu"), scheduler=schedule)

    accumulator.backward(loss_sum(model, *batch(4)) * float("inf"))
    accumulator.norm(4.0)
    updated = accumulator.apply(4.0, 1.0)

    assert not updated
    assert accumulator.stats.optimizer_steps == 0
    assert accumulator.learning_rate == 1.0


def test_limits_that_make_no_sense_are_refused():
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)

    with pytest.raises(ValueError, match="accumulation_steps must be >= 1"):
        GradientAccumulator(optimizer, accumulation_steps=0)
    for norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm must be > 0 or None"):
            GradientAccumulator(optimizer, max_grad_norm=norm)
