"""A process beside this one that works on memory which both see, so that its work costs this one no time.

It lives as long as the thread that started it at most: a worker that was killed must not go on writing while
its successor writes the same files. Signals are meant for the training, which decides what becomes of them.
"""

import logging
import math
import mmap
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ray_trainer.pulse.board import file_in_memory
from ray_trainer.pulse.descent import die_with, ignore_interruptions

logger = logging.getLogger(__name__)

#: Gets the memory, and what it calls each time that it has got on.
Job = Callable[[memoryview, Callable[[], None]], Any]

_TOLD_EVERY_S = 60.0
_LOOKS_EVERY_S = 1.0
_ENDS_WITHIN_S = 5.0
_COUNT_BYTES = 8


class ProcessBeside:
    """Does one job after the other.

    Args:
        memory: descriptor of a file in memory that jobs may read.
        clock: seconds, from any start.
    """

    def __init__(self, memory: int, clock: Callable[[], float] = time.monotonic) -> None:
        ours, theirs = Pipe()
        progress = file_in_memory("ray_trainer_progress", _COUNT_BYTES)
        descriptors = (theirs.fileno(), memory, progress)
        command = [sys.executable, "-P", "-m", __name__, *map(str, descriptors), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)
        self._progress = mmap.mmap(progress, _COUNT_BYTES, prot=mmap.PROT_READ)
        os.close(progress)
        self._connection: Connection[Any, Any] = ours
        self._clock = clock
        self._stalls_after_s = math.inf
        self._seen = b""
        self._seen_at_s = 0.0
        self._is_lost = False
        self.pid = self._process.pid
        self.is_busy = False

    def submit(self, job: Job, stalls_after_s: float = math.inf) -> None:
        """Begin a job; the one before must have been collected.

        Args:
            job: what is done.
            stalls_after_s: for so long it may not get on; then it is given up, with the process.

        Raises:
            ChildProcessError: the process is gone.
        """
        try:
            self._connection.send_bytes(pickle.dumps(job))
        except OSError as error:
            raise self._lost() from error
        self.is_busy = True
        self._stalls_after_s = stalls_after_s
        self._seen, self._seen_at_s = self._progress[:], self._clock()

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return not self.is_busy or self._connection.poll() or self._is_stalled()

    def result(self) -> Any:
        """What the job returned; waits for it.

        Raises:
            ChildProcessError: the process is gone.
            TimeoutError: the job did not get on any more; the process was ended.
            Exception: what the job raised.
        """
        waited_s = 0.0
        while not self._connection.poll(_LOOKS_EVERY_S):
            if self._is_stalled():
                self._end()
                raise TimeoutError(
                    f"Storage has taken nothing of a checkpoint for {self._stalls_after_s:g} s. The process that "
                    f"wrote it was ended. Check on {socket.gethostname()} that the run's storage can be written to: a "
                    "network file system that has lost its server keeps who writes waiting for ever."
                )
            waited_s += _LOOKS_EVERY_S
            if waited_s % _TOLD_EVERY_S == 0:
                logger.warning("A checkpoint is still being written after %.0f s more.", waited_s)
        self.is_busy = False
        try:
            value, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as lost:
            raise self._lost() from lost
        if error is not None:
            raise error
        return value

    def has_ended(self) -> bool:
        """Whether somebody ended it; what it did is lost."""
        return self._is_lost or self._process.poll() is not None

    def close(self) -> None:
        """End the process, at once if it is busy: nobody waits for what it does."""
        self._connection.close()
        if not self.is_busy:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_WITHIN_S)
        self._end()

    def _is_stalled(self) -> bool:
        """Whether the job has not got on for too long."""
        seen = self._progress[:]
        if seen != self._seen:
            self._seen, self._seen_at_s = seen, self._clock()
        return self._clock() - self._seen_at_s > self._stalls_after_s

    def _lost(self) -> ChildProcessError:
        code = self._end()
        return ChildProcessError(f"The process that writes checkpoints ended unexpectedly (exit code {code}).")

    def _end(self) -> int | None:
        """Its exit code; None where it waits in the kernel, as for a lost file system, and ends once that lets it."""
        self.is_busy = False
        self._is_lost = True
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDS_WITHIN_S)
        return self._process.returncode


def _serve(connection: "Connection[Any, Any]", memory: memoryview, goes_on: Callable[[], None]) -> None:
    while True:
        try:
            job: Job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        outcome: tuple[Any, Exception | None]
        try:
            outcome = job(memory, goes_on), None
        except Exception as error:  # raised where the result is collected
            outcome = None, error
        connection.send_bytes(_portable(outcome))


def _portable(outcome: tuple[Any, Exception | None]) -> bytes:
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception:  # an error may hold anything, and its own constructor may refuse to be called again
        return pickle.dumps((None, RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]}")))
    return data


def main() -> None:
    """Serve until the connection is closed."""
    connection, memory, progress, parent = (int(argument) for argument in sys.argv[1:])
    die_with(parent)
    ignore_interruptions()
    count = memoryview(mmap.mmap(progress, _COUNT_BYTES)).cast("q")

    def goes_on() -> None:
        count[0] += 1

    with mmap.mmap(memory, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        _serve(Connection(connection), view, goes_on)


if __name__ == "__main__":
    main()
