"""What a process is doing, from its stacks: they tell a hang from work, and waiting for others from both."""

import enum
import re
from typing import NamedTuple

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')

#: Places of code that wait for other ranks, when they are the innermost.
_WAITING = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/torch/autograd/graph.py")
#: Places that wait for Ray, when they are among the innermost few.
_RAY = re.compile(r"/(site|dist)-packages/ray/")
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
    EXCUSED = "compiles, is debugged, or waits for Ray"


def frames_of(text: str, thread: int) -> tuple[Frame, ...]:
    """The stack of one thread, innermost first, from what faulthandler wrote; empty if it is not there."""
    frames: list[Frame] = []
    is_inside = False
    for line in text.splitlines():
        head = _THREAD.match(line)
        if head:
            is_inside = int(head[1], 16) == thread
            if is_inside:
                frames = []  # the newest of several
        frame = _FRAME.match(line)
        if is_inside and frame:
            frames.append(Frame(*frame.groups()))
    return tuple(frames)


def activity(frames: tuple[Frame, ...]) -> Activity:
    """What a process with this stack does."""
    if any(mark in frame.file for frame in frames for mark in _EXCUSED):
        return Activity.EXCUSED
    if frames and any(mark in frames[0].file for mark in _WAITING):
        return Activity.WAITS
    if any(_RAY.search(frame.file) for frame in frames[:3]):
        return Activity.EXCUSED
    return Activity.OWN
