"""The newest states of a run, as copies in this process's memory."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor


class StateRing:
    """Copies of nested states, by step.

    Tensors of a GPU are kept in the host's memory. The memory of a state that is dropped is used for the next.
    """

    def __init__(self) -> None:
        self._states: dict[int, dict[str, Any]] = {}
        self._spare: dict[str, Any] | None = None

    def __contains__(self, step: int) -> bool:
        return step in self._states

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy a state; one of the same step is replaced."""
        spare, self._spare = self._states.pop(step, self._spare), None
        self._states[step] = copied(dict(state), spare)

    def state(self, step: int) -> dict[str, Any]:
        """A copy of what was kept, so that whoever loads it may keep its tensors."""
        state: dict[str, Any] = copied(self._states[step])
        return state

    def peek(self, step: int) -> dict[str, Any]:
        """What was kept itself, not to be changed."""
        return self._states[step]

    def only(self, steps: Collection[int]) -> None:
        """Drop the states of all other steps."""
        for step in [step for step in self._states if step not in steps]:
            self._spare = self._states.pop(step)


def copied(value: Any, reuse: Any = None) -> Any:
    """A deep copy of nested state.

    Args:
        value: as in a checkpoint.
        reuse: an earlier copy of something alike; its tensors are overwritten where they fit.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _copied_tensor(value.detach(), reuse)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        twin: Any = copy.copy(value)  # keeps its kind, and the versions that a module's state carries
        old = reuse if isinstance(reuse, Mapping) else {}
        for key, item in value.items():
            twin[key] = copied(item, old.get(key))
        return twin
    if isinstance(value, list | tuple):
        old_items = list(reuse) if isinstance(reuse, list | tuple) else []
        old_items += [None] * (len(value) - len(old_items))
        return type(value)([copied(item, old_item) for item, old_item in zip(value, old_items, strict=False)])
    return copy.deepcopy(value)


def _copied_tensor(value: Tensor, reuse: Any) -> Tensor:
    is_sharded = hasattr(value, "placements")
    device = value.device if is_sharded else "cpu"
    fits = type(reuse) is type(value) and reuse.shape == value.shape and reuse.dtype == value.dtype
    if fits and not is_sharded and reuse.stride() == value.stride():
        return reuse.copy_(value)  # type: ignore[no-any-return]  # a tensor, see above
    return value.clone() if is_sharded else value.to(device, copy=True)
