"""Calls the user's hooks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_trainer.distributed import RegroupError, gather_objects
from ray_trainer.errors import ConfigError
from ray_trainer.hooks.checks import HOOK_NAMES, Hook, errors_of, implemented

logger = logging.getLogger(__name__)


_ASKED = ("on_batch_end", "on_step_end", "on_validation_end", "on_epoch_end")


class HookCaller:
    """The methods of the user's hooks, looked up once.

    Each attribute is the method to call, or None if there is none or it is `DefaultHooks`' own: the loop then
    spends nothing, not even on computing the arguments.
    """

    on_training_start: Hook | None
    on_resume: Hook | None
    on_epoch_start: Hook | None
    on_batch_end: Hook | None
    on_step_end: Hook | None
    on_validation_end: Hook | None
    on_epoch_end: Hook | None
    on_checkpoint_saved: Hook | None
    on_exception: Hook | None
    on_training_end: Hook | None

    def __init__(self, hooks: object | None = None) -> None:
        """Look the methods up.

        Args:
            hooks: any object, or None.

        Raises:
            ConfigError: methods would never be called or can't be; names all of them.
        """
        errors = list(errors_of(hooks))
        if errors:
            raise ConfigError("\n".join(errors))
        for name in HOOK_NAMES:
            setattr(self, name, implemented(hooks, name))
        self._save: Hook | None = getattr(hooks, "state_dict", None)
        self._load: Hook | None = getattr(hooks, "load_state_dict", None)

    def align(self) -> None:
        """Let what hooks ask for be agreed on where only some ranks have them: the others get no-ops. Collective."""
        mine = [name for name in _ASKED if getattr(self, name) is not None]
        for name in {name for names in gather_objects(mine) for name in names} - set(mine):
            setattr(self, name, _say_nothing)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the whole training: calls its start, what went wrong, and always its end.

        An error in ``on_exception`` or ``on_training_end`` never hides the one that ended the training: it is
        logged and added to it as a note.
        """
        try:
            if self.on_training_start is not None:
                self.on_training_start()
            yield
        except BaseException as error:
            if not isinstance(error, RegroupError):  # nothing went wrong: training goes on at once
                _call_after(error, self.on_exception, error)
            _call_after(error, self.on_training_end)
            raise
        if self.on_training_end is not None:
            self.on_training_end()

    def state_dict(self) -> dict[str, Any]:
        """The hooks' own state; empty if they have none."""
        state = {} if self._save is None else self._save()
        if not isinstance(state, dict):
            raise ConfigError(f"The hooks' state_dict() returned {type(state).__name__}. Return a dict of plain data.")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the hooks their state back."""
        if self._load is not None:
            self._load(state_dict)
        elif state_dict:
            logger.warning("The checkpoint holds state of hooks, these have no load_state_dict(): it is dropped.")


def _call_after(error: BaseException, hook: Hook | None, *arguments: object) -> None:
    if hook is None:
        return
    try:
        hook(*arguments)
    except Exception as hook_error:  # whatever it is, the first error is the one to be raised
        logger.exception("%s failed after the training had failed.", getattr(hook, "__qualname__", hook))
        error.add_note(f"Then {getattr(hook, '__qualname__', hook)} failed as well: {hook_error!r}")


def _say_nothing(*_: object) -> None:
    """Stand in for a hook that another rank has."""
