"""The signs of life of this process: which phase of training it is in, for whoever watches it.

The process is what hangs, so there is one pulse of it, as there is one process group; `begun` gives it one. Until
then a beat costs the call. Imports nothing but the standard library: the watching process is small.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ray_trainer.pulse.board import Pulse, Silence
from ray_trainer.pulse.phases import COMPARED, Phase

__all__ = ["COMPARED", "Phase", "Pulse", "beat", "begun", "during", "measured", "step", "take_own_times"]

_pulse: Pulse | Silence = Silence()


def beat(phase: Phase) -> Phase:
    """A phase begins; returns the one before. Takes half a microsecond, and for the training thread only."""
    return _pulse.beat(phase)


def step(number: int) -> None:
    """A step begins, after so many completed ones."""
    _pulse.step(number)


def take_own_times() -> list[float]:
    """Seconds this rank has spent in each of `COMPARED` since the last call; zeros without a pulse."""
    return _pulse.take_own_times()


@contextmanager
def during(phase: Phase) -> Iterator[None]:
    """A phase inside of another one."""
    before = beat(phase)
    try:
        yield
    finally:
        beat(before)


@contextmanager
def begun(pulse: Pulse) -> Iterator[None]:
    """The pulse of this process, for as long as the block lasts; the calling thread is the one that trains."""
    global _pulse
    before, _pulse = _pulse, pulse
    try:
        yield
    finally:
        _pulse = before


@contextmanager
def measured(is_needed: bool) -> Iterator[None]:
    """A pulse that nobody watches, for the times by phase, where it is needed and there is none yet."""
    if not is_needed or isinstance(_pulse, Pulse):
        yield
        return
    with begun(Pulse.unwatched()):
        yield
