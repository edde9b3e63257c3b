"""Which methods of an object are hooks, and which only look like one."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ray_trainer.hooks.contract import DefaultHooks, TrainingHooks

Hook = Callable[..., Any]

HOOK_NAMES = tuple(name for name in vars(TrainingHooks) if name.startswith("on_"))

_OTHER_NAMES = {  # of Lightning, Transformers, Keras, Composer, Ignite, torchtnt
    "on_fit_start": "on_training_start",
    "on_train_start": "on_training_start",
    "on_train_begin": "on_training_start",
    "on_train_epoch_start": "on_epoch_start",
    "on_epoch_begin": "on_epoch_start",
    "on_batch_start": "on_batch_end",
    "on_batch_begin": "on_batch_end",
    "on_train_batch_start": "on_batch_end",
    "on_train_batch_begin": "on_batch_end",
    "on_train_batch_end": "on_batch_end",
    "on_step_start": "on_step_end",
    "on_step_begin": "on_step_end",
    "on_train_step_start": "on_step_end",
    "on_train_step_end": "on_step_end",
    "on_substep_end": "on_batch_end",
    "on_before_optimizer_step": "on_step_end",
    "on_log": "on_step_end",
    "on_evaluate": "on_validation_end",
    "on_eval_end": "on_validation_end",
    "on_test_end": "on_validation_end",
    "on_validation_epoch_end": "on_validation_end",
    "on_train_epoch_end": "on_epoch_end",
    "on_save": "on_checkpoint_saved",
    "on_save_checkpoint": "on_checkpoint_saved",
    "on_checkpoint": "on_checkpoint_saved",
    "on_load_checkpoint": "on_resume",
    "on_keyboard_interrupt": "on_exception",
    "on_error": "on_exception",
    "on_fit_end": "on_training_end",
    "on_train_end": "on_training_end",
}


def implemented(hooks: object | None, name: str) -> Hook | None:
    """The method to call for a hook; None if there is none or it does nothing."""
    method = getattr(hooks, name, None)
    no_ops = (vars(DefaultHooks)[name], vars(TrainingHooks)[name])
    return None if getattr(method, "__func__", None) in no_ops else method


def errors_of(hooks: object | None) -> Iterator[str]:
    """What is wrong with an object that shall be used as hooks, one sentence each."""
    if isinstance(hooks, type):
        yield f"hooks is the class {hooks.__name__}. Pass an object: {hooks.__name__}()."
        return
    if isinstance(hooks, list | tuple):
        yield f"hooks is a {type(hooks).__name__}. Pass one object whose methods call those of the others."
        return
    who = type(hooks).__name__
    for name in dir(hooks):
        meant = _OTHER_NAMES.get(name) or _nearly_a_hook(name)
        if meant and callable(getattr(hooks, name, None)):
            known = ", ".join(HOOK_NAMES)
            yield f"{who}.{name} would never be called: did you mean {meant}? There are {known}."
    for name in HOOK_NAMES:
        yield from _signature_errors(who, name, implemented(hooks, name), vars(TrainingHooks)[name])
    if hasattr(hooks, "state_dict") != hasattr(hooks, "load_state_dict"):
        yield f"{who} has only one of state_dict and load_state_dict. Add the other: saved state must be loaded."


def _nearly_a_hook(name: str) -> str | None:
    if not name.startswith("on_") or name in HOOK_NAMES:
        return None
    return next(iter(difflib.get_close_matches(name, HOOK_NAMES, n=1, cutoff=0.9)), None)


def _signature_errors(who: str, name: str, method: object, contract: Hook) -> Iterator[str]:
    if method is None:
        return
    arguments = list(inspect.signature(contract).parameters)[1:]
    wanted = f"{name}({', '.join(arguments)})"
    if not callable(method):
        yield f"{who}.{name} is {method!r}, which can't be called. It must be a method {wanted}."
    elif inspect.iscoroutinefunction(method):
        yield f"{who}.{name} is async and would never run. Make it a plain method {wanted}."
    else:
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            yield f"{who}.{name}{inspect.signature(method)} can't be called as {wanted}: {error}."
        except ValueError:
            return  # written in C: it has no signature to look at
