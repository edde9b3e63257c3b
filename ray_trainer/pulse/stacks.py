"""What a process is doing, from its stacks: they tell a hang from work, and waiting for others from both."""

import enum
import os
import re
import signal
import time
from typing import NamedTuple

_WRITTEN_WITHIN_S = 1.0
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')

#: Places of code that wait for other ranks, when they are the innermost.
_WAITING = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/torch/autograd/graph.py")
#: Places that wait for Ray, when they are among the innermost few.
_RAY = re.compile(r"/(site|dist)-packages/ray/")
#: Likewise for storage, a network or another process.
_OUTSIDE = re.compile(
    r"/(socket|ssl|selectors|threading|queue|subprocess|multiprocessing/(connection|queues))\.py$"
    r"|/(ray_trainer/storage|pyarrow|urllib3|fsspec)/"
)
#: Places anywhere in a stack that take long now and then, and are none of a hang.
_EXCUSED = (
    "/torch/_dynamo/convert_frame.py",
    "/torch/_inductor/compile_fx.py",
    "/torch/_inductor/runtime/triton_heuristics.py",
    "/triton/compiler/",
    "/pdb.py",
    "/debugpy/",
)


class Frame(NamedTuple):
    """A place in the code."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


class Activity(enum.Enum):
    """What a stack that does not change means."""

    OWN = "in code of its own"
    WAITS = "waits for other ranks"
    OUTSIDE = "waits for what is outside of the process"
    EXCUSED = "compiles, is debugged, or waits for Ray"


class StackFile:
    """Has a process's stacks written by the handler in C that it has installed, which needs no GIL."""

    def __init__(self, pid: int, descriptor: int, number: int) -> None:
        """Write nothing yet.

        Args:
            pid: of the process.
            descriptor: of the file that its handler appends to.
            number: the signal that it handles.
        """
        self._pid = pid
        self._descriptor = descriptor
        self._signal = number

    def take(self, thread: int) -> str:
        """The stacks of all threads now, with that of ``thread``; empty if the process does not write them."""
        os.ftruncate(self._descriptor, 0)
        os.kill(self._pid, self._signal)
        return self._written(thread, look_every_s=0.05)

    def take_stopped(self, thread: int) -> str:
        """As `take`, of a process that was stopped: it runs for the few milliseconds that this takes."""
        os.ftruncate(self._descriptor, 0)
        os.kill(self._pid, self._signal)  # handled before anything else, once it runs
        os.kill(self._pid, signal.SIGCONT)
        try:
            return self._written(thread, look_every_s=0.003)
        finally:
            os.kill(self._pid, signal.SIGSTOP)

    def _written(self, thread: int, look_every_s: float) -> str:
        """What is in the file once it does not grow any more; a busy machine may hold up who writes it."""
        size, until = 0, time.monotonic() + _WRITTEN_WITHIN_S
        text = ""
        while time.monotonic() < until:
            time.sleep(look_every_s)
            written = os.fstat(self._descriptor).st_size
            if written and written == size and frames_of(text, thread):
                break
            size = written
            text = os.pread(self._descriptor, size, 0).decode(errors="replace")
        return text


def frames_of(text: str, thread: int) -> tuple[Frame, ...]:
    """The stack of one thread, innermost first, from what faulthandler wrote up to now; empty if it is not there."""
    frames: list[Frame] = []
    is_inside = False
    for line in text[: text.rfind("\n") + 1].splitlines():  # the rest of a line may be on its way
        head = _THREAD.match(line)
        if head:
            is_inside = int(head[1], 16) == thread
            if is_inside:
                frames = []  # the newest of several
        frame = _FRAME.match(line)
        if is_inside and frame:
            frames.append(Frame(*frame.groups()))
    return tuple(frames)


def are_alike(one: tuple[Frame, ...], other: tuple[Frame, ...]) -> bool:
    """Whether two stacks may be the same: on a busy machine one of them may have been read before it was whole."""
    return all(first == second for first, second in zip(one, other, strict=False))


def activity(frames: tuple[Frame, ...]) -> Activity:
    """What a process with this stack does."""
    if any(mark in frame.file for frame in frames for mark in _EXCUSED):
        return Activity.EXCUSED
    if frames and any(mark in frames[0].file for mark in _WAITING):
        return Activity.WAITS
    if any(_RAY.search(frame.file) for frame in frames[:3]):
        return Activity.EXCUSED
    if any(_OUTSIDE.search(frame.file) for frame in frames[:3]):
        return Activity.OUTSIDE
    return Activity.OWN
