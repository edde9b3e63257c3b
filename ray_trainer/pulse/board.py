"""The memory in which a process leaves its signs of life and another one reads them. No locks."""

import mmap
import os
import tempfile
import threading
import time
from typing import NamedTuple

from ray_trainer.pulse.phases import COMPARED, Phase

_BEATS, _PHASE, _STEP, _EXCHANGES, _THREAD, _TURNS, _COUNTS = range(7)
#: Durations are counted in classes: the b-th holds those from 2**(b-1) to 2**b microseconds.
NUM_CLASSES = 42
_NUM_INTEGERS = _COUNTS + len(Phase) * NUM_CLASSES
_LONGEST = _NUM_INTEGERS * 8
SIZE_BYTES = _LONGEST + len(Phase) * 8


class Durations(NamedTuple):
    """How long a phase has lasted so far.

    Attributes:
        counts: by class.
        longest_s: of all.
    """

    counts: tuple[int, ...]
    longest_s: float


class Reading(NamedTuple):
    """What was on the board.

    Attributes:
        beats: so far; a process in which it stands still is in one phase all the while.
        phase: in which it is.
        step: completed steps when the one in progress began.
        exchanges: with other ranks that were entered since then.
        thread: identity of the training thread.
        turns: how often another thread had its turn; while one holds the interpreter, none has.
    """

    beats: int
    phase: Phase
    step: int
    exchanges: int
    thread: int
    turns: int


class Pulse:
    """Writes the board; for one thread, `turn` for another one."""

    def __init__(self, memory: memoryview) -> None:
        """Begin in `Phase.SETUP`.

        Args:
            memory: `SIZE_BYTES` of zeros.
        """
        self._integers = memory[:_LONGEST].cast("q")
        self._longest = memory[_LONGEST:SIZE_BYTES].cast("d")
        self._own_s = [0.0] * len(Phase)
        self._phase = Phase.SETUP
        self._beats = 0
        self._since = time.monotonic()
        self._integers[_THREAD] = threading.get_ident()

    @classmethod
    def unwatched(cls) -> "Pulse":
        """One whose times alone are of interest."""
        return cls(memoryview(bytearray(SIZE_BYTES)))

    def beat(self, phase: Phase) -> Phase:
        """See `ray_trainer.pulse.beat`."""
        integers, before = self._integers, self._phase
        now = time.monotonic()
        spent_s = now - self._since
        self._since = now
        self._phase = phase
        self._own_s[before] += spent_s
        integers[_COUNTS + before * NUM_CLASSES + int(spent_s * 1e6).bit_length()] += 1
        if spent_s > self._longest[before]:
            self._longest[before] = spent_s
        if phase is Phase.EXCHANGE:
            integers[_EXCHANGES] += 1
        integers[_PHASE] = phase
        self._beats += 1
        integers[_BEATS] = self._beats  # last: who sees the same number twice has seen the same phase
        return before

    def step(self, number: int) -> None:
        """See `ray_trainer.pulse.step`."""
        self._integers[_STEP] = number
        self._integers[_EXCHANGES] = 0

    def turn(self) -> None:
        """A thread that has nothing else to do had its turn."""
        self._integers[_TURNS] += 1

    def take_own_times(self) -> list[float]:
        """See `ray_trainer.pulse.take_own_times`."""
        own_s = self._own_s
        taken = [own_s[phase] for phase in COMPARED]
        for phase in COMPARED:
            own_s[phase] = 0.0
        return taken


class Silence:
    """No pulse."""

    def beat(self, phase: Phase) -> Phase:
        """Nothing."""
        return phase

    def step(self, number: int) -> None:
        """Nothing."""

    def take_own_times(self) -> list[float]:
        """Zeros."""
        return [0.0] * len(COMPARED)


class Board:
    """Reads what a `Pulse` has written."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, SIZE_BYTES, prot=mmap.PROT_READ)
        self._integers = memoryview(self._map)[:_LONGEST].cast("q")
        self._longest = memoryview(self._map)[_LONGEST:].cast("d")

    def read(self) -> Reading:
        """What is there now; may mix two moments unless `beats` stays the same."""
        numbers = self._integers[:_COUNTS].tolist()
        return Reading(numbers[_BEATS], Phase(numbers[_PHASE]), *numbers[_STEP:])

    def durations(self, phase: Phase) -> Durations:
        """Those of a phase, without the one in progress."""
        first = _COUNTS + phase * NUM_CLASSES
        return Durations(tuple(self._integers[first : first + NUM_CLASSES]), self._longest[phase])


def file_in_memory(name: str, size_bytes: int = 0) -> int:
    """Descriptor of a file of zeros that is in no directory and goes with the last process that has it open."""
    if hasattr(os, "memfd_create"):  # Linux
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size_bytes)
    return descriptor
