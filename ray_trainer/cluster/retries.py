"""When to give up: failures without progress, and errors that would only come back.

A run on a large cluster may lose a worker a thousand times and still get to its end, while a run that fails at the
same step again and again never will. So what is limited is not the number of failures.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping

from ray_trainer.errors import MemoryShortageError, RayTrainerError

_PLACE = re.compile(r'File "(.+)", line (\d+), in ')
#: May pass by themselves, so that the same one twice says nothing.
_PASSING = (OSError, RayTrainerError)

_ANSWERED_AT_ONCE = 3
_REMEMBERED_S = 300.0
_LONGEST_PAUSE_S = 30.0

Place = tuple[str, ...]


class Retries:
    """Counts failures in a row during which training got no further.

    Args:
        limit: so many are allowed; -1 allows any number.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._furthest = -1
        self._failures = 0

    def allow(self, step: int) -> bool:
        """Whether to try again after a failure.

        Args:
            step: the furthest that training has completed so far; 0 if none.
        """
        if step > self._furthest:
            self._furthest, self._failures = step, 0
        self._failures += 1
        return self._limit < 0 or self._failures <= self._limit


class Episodes:
    """Tells a failure from what it does to other ranks, which may be seen a moment later."""

    def __init__(self) -> None:
        self._attempt = -1
        self._ranks: set[int] = set()

    def is_new(self, attempt: int, ranks: Collection[int]) -> bool:
        """Whether ranks failed anew: in another attempt than the last that did, or for the second time in it."""
        if attempt == self._attempt and self._ranks.isdisjoint(ranks):
            self._ranks.update(ranks)
            return False
        self._attempt, self._ranks = attempt, set(ranks)
        return True


class Pauses:
    """How long to wait before a worker that nobody waits for is replaced, so that one that keeps dying costs little.

    Nothing is lost by it, so that it is no reason to end the run, however often it happens.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: list[float] = []

    def after_loss(self) -> float:
        """Seconds to wait after a loss that has just been seen: none at first, then twice as long each time."""
        now_s = self._clock()
        self._losses = [loss_s for loss_s in self._losses if loss_s > now_s - _REMEMBERED_S] + [now_s]
        excess = len(self._losses) - _ANSWERED_AT_ONCE
        return min(2.0 ** (excess - 1), _LONGEST_PAUSE_S) if excess > 0 else 0.0


class Repetitions:
    """Remembers where each rank raised its last error.

    By rank, because an error that all ranks have may be seen on one after the other.
    """

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}

    def find(self, errors: Mapping[int, BaseException]) -> int | None:
        """A rank whose error is its last one again: the same kind, at the same line, after the same step.

        Errors that may pass do not count, nor do processes that died without one. Memory may not suffice because of
        a neighbour, and is the same again for as many samples in the same step.
        """
        found = {rank: place for rank, error in errors.items() if (place := _place(error))}
        again = next((rank for rank, place in found.items() if self._places.get(rank) == place), None)
        self._places |= found
        return again


def note_place(error: BaseException, traceback: str, step: int) -> None:
    """Keep where a worker raised an error: Ray passes on the error alone, with its notes."""
    error.add_note(traceback)
    error.add_note(f"after step {step}")


def _place(error: BaseException) -> Place | None:
    if isinstance(error, MemoryShortageError):  # wherever in the step it was that nothing was left
        return (type(error).__name__, str(error).partition(":")[0])
    notes = getattr(error, "__notes__", [])
    if len(notes) < 2 or isinstance(error, _PASSING):
        return None
    frames = _PLACE.findall(notes[-2])
    return (type(error).__name__, *frames[-1], notes[-1]) if frames else None
