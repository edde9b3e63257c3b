"""When a process counts as hung, second by second as its monitor counts them; the process is a real one."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ray_trainer.pulse.board import SIZE_BYTES, file_in_memory
from ray_trainer.pulse.orders import Assignment, Orders
from ray_trainer.pulse.watch import Hang, Watch

FLOOR_S, TICK_S = 10.0, 0.25
WORKER = """
import faulthandler, fcntl, mmap, os, signal, sys, time
from ray_trainer.pulse import Phase, Pulse

board, stacks = (int(argument) for argument in sys.argv[1:])
fcntl.fcntl(stacks, fcntl.F_SETFL, os.O_APPEND)
faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
pulse = Pulse(memoryview(mmap.mmap(board, 0)))
for step in range(20):
    pulse.step(step)
    pulse.beat(Phase.DATA)
    pulse.beat(Phase.FORWARD)

def at_work():  # each of these on one line, so that the stack is the same from "ready" on
    print("ready", flush=True), sys.stdin.readline()

def hangs():
    print("ready", flush=True), time.sleep(1000)

at_work()
hangs()
"""


class Worker:
    """A process in its twentieth forward pass, which goes on to another place of it once it is told."""

    def __init__(self, process: "subprocess.Popen[str]", watch: Watch) -> None:
        assert process.stdin is not None  # pipes
        assert process.stdout is not None
        self._input: IO[str] = process.stdin
        self._output: IO[str] = process.stdout
        self._watch = watch
        self.still_s = 0.0
        self._output.readline()

    def go_on(self) -> None:
        self._input.write("\n")
        self._input.flush()
        self._output.readline()

    def watched_for(self, seconds: float) -> Hang | None:
        """What is found within so many seconds of the monitor's."""
        until_s = self.still_s + seconds
        while self.still_s < until_s:
            self.still_s += TICK_S
            found = self._watch.look(TICK_S)
            if found is not None:
                return found
        return None


@contextmanager
def worker() -> Iterator[Worker]:
    board, stacks = file_in_memory("board", SIZE_BYTES), file_in_memory("stacks")
    command = [sys.executable, "-c", WORKER, str(board), str(stacks)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[board, stacks]
    ) as process:
        orders = Orders(
            rank=0, world_size=1, floor_s=FLOOR_S, patience_s=1800.0, past=[], desk=None, token="", storage=""
        )
        try:
            yield Worker(process, Watch(Assignment(process.pid, board, stacks, int(signal.SIGUSR2), None, orders)))
        finally:
            process.kill()


def test_worker_whose_stack_stays_the_same_counts_as_hung_as_soon_as_its_time_is_over():
    with worker() as waits:
        assert waits.watched_for(FLOOR_S - TICK_S) is None
        found = waits.watched_for(1.0)

    assert found is not None
    assert found.seconds >= FLOOR_S


def test_worker_whose_stack_has_changed_is_given_all_its_time_once_more():
    with worker() as works:
        assert works.watched_for(FLOOR_S - 2.0) is None
        works.go_on()
        assert works.watched_for(FLOOR_S) is None
        found = works.watched_for(2.0)

    assert found is not None
