import functools
import inspect
from unittest.mock import Mock

import pytest
import torch

from ray_trainer.distributed import RegroupError
from ray_trainer.errors import ConfigError
from ray_trainer.hooks import (
    DefaultHooks,
    HookCaller,
    Request,
    StepRecord,
    TrainingHooks,
    requested,
)

NAMES = [name for name in vars(TrainingHooks) if name.startswith("on_")]


def hooks_with(**methods):
    return type("Hooks", (), methods)()


@pytest.mark.parametrize("hooks", [None, DefaultHooks(), object(), type("Own", (TrainingHooks,), {})()])
def test_hooks_that_do_nothing_are_not_called_at_all(hooks):
    caller = HookCaller(hooks)

    assert [getattr(caller, name) for name in NAMES] == [None] * len(NAMES)
    assert caller.state_dict() == {}
    with caller.training():
        pass


def test_only_the_methods_that_are_there_are_called():
    class Hooks(DefaultHooks):
        def on_epoch_end(self, epoch, metrics):
            return epoch, metrics

    caller = HookCaller(Hooks())

    assert caller.on_epoch_end is not None
    assert caller.on_epoch_end(1, {"loss": 2.0}) == (1, {"loss": 2.0})
    assert caller.on_batch_end is None


def test_a_falsy_object_is_used_as_well():
    hooks = hooks_with(__len__=lambda self: 0, on_training_start=lambda self: None)

    assert not hooks
    assert HookCaller(hooks).on_training_start is not None


def test_a_mock_of_the_protocol_sees_every_call():
    mock = Mock(spec=TrainingHooks)
    caller = HookCaller(mock)

    with caller.training():
        caller.on_batch_end(0, 1.0)
        caller.on_validation_end({"val_loss": 1.0})

    mock.on_training_start.assert_called_once_with()
    mock.on_batch_end.assert_called_once_with(0, 1.0)
    mock.on_validation_end.assert_called_once_with({"val_loss": 1.0})
    mock.on_training_end.assert_called_once_with()
    assert caller.state_dict() == {}


def test_the_protocol_and_the_default_have_the_same_methods():
    for name in NAMES:
        contract, default = (inspect.signature(getattr(cls, name)) for cls in (TrainingHooks, DefaultHooks))
        assert contract == default


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("on_train_start", "on_training_start"),
        ("on_train_begin", "on_training_start"),
        ("on_step_begin", "on_step_end"),
        ("on_train_epoch_end", "on_epoch_end"),
        ("on_log", "on_step_end"),
        ("on_train_end", "on_training_end"),
        ("on_trainig_start", "on_training_start"),
    ],
)
def test_the_name_of_another_trainer_is_refused_with_ours(name, meant):
    hooks = hooks_with(**{name: lambda self: None})

    with pytest.raises(ConfigError, match=rf"Hooks\.{name} would never be called: did you mean {meant}\?"):
        HookCaller(hooks)


def test_methods_and_data_of_their_own_are_left_alone():
    hooks = hooks_with(on_gpu=True, on_log="run.log", on_button=lambda self: None, only=lambda self: None)

    HookCaller(hooks)


def test_all_errors_are_listed_at_once():
    hooks = hooks_with(
        on_train_end=lambda self: None,
        on_batch_end=lambda self, loss: None,
        on_epoch_start=3,
        state_dict=lambda self: {},
    )

    with pytest.raises(ConfigError) as caught:
        HookCaller(hooks)

    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "did you mean on_training_end?" in lines[0]
    assert "Hooks.on_epoch_start is 3, which can't be called" in lines[1]
    assert "can't be called as on_batch_end(batch_idx, loss)" in lines[2]
    assert "only one of state_dict and load_state_dict" in lines[3]


@pytest.mark.parametrize(
    "method",
    [
        lambda self, batch_idx, loss: None,
        lambda self, i, x, more=None: None,
        lambda self, *anything: None,
        functools.partialmethod(lambda self, prefix, i, x: None, "prefix"),
        staticmethod(lambda i, x: None),
        staticmethod(print),
    ],
)
def test_every_signature_that_can_be_called_is_accepted(method):
    assert HookCaller(hooks_with(on_batch_end=method)).on_batch_end is not None


@pytest.mark.parametrize("method", [lambda self: None, lambda self, a, b, c: None, lambda self, *, loss: None])
def test_a_signature_that_cannot_be_called_is_refused(method):
    with pytest.raises(ConfigError, match=r"can't be called as on_batch_end\(batch_idx, loss\)"):
        HookCaller(hooks_with(on_batch_end=method))


def test_what_is_not_an_object_with_hooks_is_refused():
    async def on_training_start(self):
        pass

    with pytest.raises(ConfigError, match=r"Pass an object: DefaultHooks\(\)"):
        HookCaller(DefaultHooks)
    with pytest.raises(ConfigError, match="Pass one object"):
        HookCaller([DefaultHooks()])
    with pytest.raises(ConfigError, match="is async and would never run"):
        HookCaller(hooks_with(on_training_start=on_training_start))


@pytest.mark.parametrize("answer", [None, True, 3, "stop", object(), Mock()])
def test_answers_that_are_no_request_are_ignored(answer):
    assert requested(answer) == Request(0)
    assert not requested(answer)


def test_requests_combine():
    assert requested(Request.STOP) | requested(Request.SAVE) == Request.STOP | Request.SAVE


def test_the_end_is_called_after_an_error_which_stays_the_one_that_is_raised():
    calls = []
    hooks = hooks_with(
        on_exception=lambda self, error: calls.append(error),
        on_training_end=lambda self: calls.append("end"),
    )
    error = KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt) as caught, HookCaller(hooks).training():
        raise error

    assert caught.value is error
    assert calls == [error, "end"]


def test_ranks_that_leave_their_group_for_a_larger_one_are_no_exception_to_hooks():
    calls = []
    hooks = hooks_with(
        on_exception=lambda self, error: calls.append(error), on_training_end=lambda self: calls.append(0)
    )

    with pytest.raises(RegroupError), HookCaller(hooks).training():
        raise RegroupError("another worker is ready to join")

    assert calls == [0]


def test_an_error_of_the_end_does_not_hide_the_first_error(caplog):
    class Hooks:
        def on_exception(self, error):
            raise OSError("disk")

        def on_training_end(self):
            raise ValueError("second")

    with pytest.raises(RuntimeError, match="first") as caught, HookCaller(Hooks()).training():
        raise RuntimeError("first")

    assert "OSError('disk')" in caught.value.__notes__[0]
    assert "Hooks.on_training_end failed as well: ValueError('second')" in caught.value.__notes__[1]
    assert "failed after the training had failed" in caplog.text


def test_an_error_of_the_start_is_followed_by_the_end():
    calls = []

    class Hooks:
        def on_training_start(self):
            raise RuntimeError("start")

        def on_training_end(self):
            calls.append("end")

    with pytest.raises(RuntimeError, match="start"), HookCaller(Hooks()).training():
        calls.append("trained")

    assert calls == ["end"]


def test_an_error_of_the_end_alone_is_raised():
    def on_training_end(self):
        raise ValueError("end")

    with pytest.raises(ValueError, match="end"), HookCaller(hooks_with(on_training_end=on_training_end)).training():
        pass


def test_the_state_of_hooks_is_kept_where_they_have_one(caplog):
    class Counting:
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    before, after = Counting(), Counting()
    before.count = 7

    HookCaller(after).load_state_dict(HookCaller(before).state_dict())
    HookCaller(None).load_state_dict(HookCaller(before).state_dict())

    assert after.count == 7
    assert "it is dropped" in caplog.text


def test_a_state_that_is_no_dict_is_refused():
    hooks = hooks_with(state_dict=lambda self: [1], load_state_dict=lambda self, state: None)

    with pytest.raises(ConfigError, match=r"state_dict\(\) returned list"):
        HookCaller(hooks).state_dict()


def test_the_loss_of_a_step_is_computed_when_it_is_read():
    record = StepRecord(
        step=1,
        epoch=0,
        loss_sum=torch.tensor(6.0),
        loss_count=torch.tensor(4),
        gradient_norm=1.0,
        learning_rate=0.1,
        num_samples=4,
        skipped=False,
    )

    assert record.loss == 1.5
    record.loss_count = 0
    assert record.loss != record.loss
