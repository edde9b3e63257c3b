"""Mixed precision, compilation and deterministic mode are really on, and really off again."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from experiments import POINTS, Network, Points, assert_same, carry_out, checkpoints, prepare, run, settings
from torch import nn

from ray_trainer import Trainer


class Witness(Network):
    """Notes the dtypes of what its layers compute."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()
        self.layers[0].register_forward_hook(lambda layer, given, made: self.dtypes.add((self.training, made.dtype)))


def train(run_dir, model, hooks=None, **changes):
    trainer = Trainer(model, SimpleNamespace(), settings(run_dir, **changes), POINTS, hooks)
    return trainer, trainer.train(Points(9), Points(5))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"use_amp": True}, torch.bfloat16),
        ({"precision": "bf16-mixed"}, torch.bfloat16),
        ({"precision": "fp16-mixed"}, torch.float16),
    ],
    ids=str,
)
def test_layers_compute_in_the_configured_precision_in_training_and_validation(tmp_path, changes, dtype):
    model = Witness()

    train(tmp_path, model, epochs=1, **changes)

    trained = {seen for training, seen in model.dtypes if training}
    assert trained == {dtype}
    assert (False, dtype) in model.dtypes
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_run_in_mixed_precision_that_is_broken_off_ends_bit_equal(tmp_path, precision):
    mixed = {"precision": precision, "log_every_n_steps": 100}
    stopped = prepare(tmp_path / "broken", **mixed)

    def fail():
        raise InterruptedError

    stopped.diary.act("on_step_end", 3, fail)
    with pytest.raises(InterruptedError):
        carry_out(stopped)

    assert_same(run(tmp_path / "broken", **mixed), run(tmp_path / "whole", **mixed))


def test_fp16_learns_what_fp32_learns_within_its_precision(tmp_path):
    losses = [
        run(tmp_path / precision, precision=precision).results["final_loss"] for precision in ("fp32", "fp16-mixed")
    ]

    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # float16 has 3 digits


@pytest.mark.slow  # a cold compilation takes up to 40 s here
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on the CPU")
def test_compiled_model_is_compiled_and_keeps_its_names(tmp_path):
    class Aware(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.is_compiled = False

        def forward(self, features):
            self.is_compiled = torch.compiler.is_compiling()
            return self.layer(features)

    model = Aware()

    train(tmp_path, model, epochs=1, batch_size=3, gradient_accumulation_steps=1, compile_mode="default")

    assert model.is_compiled
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    assert len(checkpoints(tmp_path)) == 1


def test_model_is_not_compiled_unless_that_is_configured(tmp_path):
    model = Network()

    train(tmp_path, model, epochs=1)

    assert model._compiled_call_impl is None


class Flags:
    def __init__(self):
        self.seen = []

    def on_step_end(self, record):
        self.seen.append(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_mode_is_on_in_training_as_configured_and_off_afterwards(tmp_path, deterministic):
    flags = Flags()

    train(tmp_path, Network(), flags, epochs=1, deterministic=deterministic)

    assert set(flags.seen) == {deterministic}
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_mode_is_off_again_after_an_error(tmp_path):
    model = Network()

    def fail(training):
        raise InterruptedError

    model.on_forward = fail
    with pytest.raises(InterruptedError):
        train(tmp_path, model, deterministic=True)

    assert not torch.are_deterministic_algorithms_enabled()


def test_construction_alone_leaves_torch_s_flags_as_they_are(tmp_path):
    Trainer(Network(), SimpleNamespace(), settings(tmp_path, deterministic=True), POINTS)

    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_trainer_leaves_the_signal_handlers_as_it_found_them(tmp_path):
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    train(tmp_path, Network(), epochs=1)

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
