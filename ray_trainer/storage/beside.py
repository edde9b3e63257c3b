"""A process beside this one that works on memory which both see, so that its work costs this one no time.

It lives as long as the thread that started it at most: a worker that was killed must not go on writing while
its successor writes the same files. Signals are meant for the training, which decides what becomes of them.
"""

import logging
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ray_trainer.pulse.descent import die_with, ignore_interruptions

logger = logging.getLogger(__name__)

Job = Callable[[memoryview], Any]

_TOLD_EVERY_S = 60.0
_ENDS_WITHIN_S = 5.0


class ProcessBeside:
    """Does one job after the other.

    Args:
        memory: descriptor of a file in memory that jobs may read.
    """

    def __init__(self, memory: int) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(memory), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), memory), stdin=subprocess.DEVNULL, env=environment
            )
        self._connection: Connection[Any, Any] = ours
        self.pid = self._process.pid
        self.is_busy = False

    def submit(self, job: Job) -> None:
        """Begin a job; the one before must have been collected.

        Raises:
            ChildProcessError: the process is gone.
        """
        try:
            self._connection.send_bytes(pickle.dumps(job))
        except OSError as error:
            raise self._lost() from error
        self.is_busy = True

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return not self.is_busy or self._connection.poll()

    def result(self) -> Any:
        """What the job returned; waits for it.

        Raises:
            ChildProcessError: the process is gone.
            Exception: what the job raised.
        """
        waited_s = 0.0
        while not self._connection.poll(_TOLD_EVERY_S):
            waited_s += _TOLD_EVERY_S
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
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process, at once if it is busy: nobody waits for what it does."""
        self._connection.close()
        if self.is_busy:
            self._process.kill()
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _lost(self) -> ChildProcessError:
        self.is_busy = False
        self._process.kill()
        code = self._process.wait()
        return ChildProcessError(f"The process that writes checkpoints ended unexpectedly (exit code {code}).")


def _serve(connection: "Connection[Any, Any]", memory: memoryview) -> None:
    while True:
        try:
            job: Job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        outcome: tuple[Any, Exception | None]
        try:
            outcome = job(memory), None
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
    connection, memory, parent = (int(argument) for argument in sys.argv[1:])
    die_with(parent)
    ignore_interruptions()
    with mmap.mmap(memory, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        _serve(Connection(connection), view)


if __name__ == "__main__":
    main()
