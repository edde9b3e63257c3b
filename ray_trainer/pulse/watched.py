"""A process that lets itself be watched: its board, its stacks on demand, and the process that looks at both."""

import faulthandler
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray_trainer import pulse
from ray_trainer.pulse.board import SIZE_BYTES, file_in_memory
from ray_trainer.pulse.orders import Assignment, Orders

#: Nobody else uses it: SIGUSR1 and SIGUSR2 are how schedulers announce a preemption.
_DUMP_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR2))
_TURN_EVERY_S = 0.5


class Watched:
    """This process, for as long as it is watched. The thread that makes one is the one that trains."""

    def __init__(self) -> None:
        self._board = file_in_memory("ray_trainer_board", SIZE_BYTES)
        self._stacks = file_in_memory("ray_trainer_stacks")
        fcntl.fcntl(self._stacks, fcntl.F_SETFL, os.O_APPEND)  # both processes share it, and one of them empties it
        faulthandler.register(_DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._pulse = pulse.Pulse(memoryview(mmap.mmap(self._board, SIZE_BYTES)))
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life in the block; at its end nobody watches any more."""
        threading.Thread(target=self._take_turns, name="ray-trainer-turns", daemon=True).start()
        try:
            with pulse.begun(self._pulse):
                yield
        finally:
            self._closed.set()
            self._end()
            faulthandler.unregister(_DUMP_SIGNAL)
            os.close(self._stacks)
            os.close(self._board)

    def be_watched(self, orders: Orders, listener: int | None = None) -> int:
        """Start the process that watches; its id. It ends with the calling thread, or with `alive`.

        Args:
            orders: what it has to know.
            listener: descriptor of the desk's socket, beside rank 0.

        Raises:
            OSError: it could not be started.
        """
        assignment = Assignment(os.getpid(), self._board, self._stacks, _DUMP_SIGNAL, listener, orders)
        descriptors = [number for number in (self._board, self._stacks, listener) if number is not None]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "ray_trainer.pulse.process"],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdin is not None  # a pipe
        with self._process.stdin as pipe:
            pipe.write(assignment.to_json().encode())
        return self._process.pid

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _take_turns(self) -> None:
        """Show that threads can run; while one holds the interpreter, no other does."""
        while not self._closed.wait(_TURN_EVERY_S):
            self._pulse.turn()
