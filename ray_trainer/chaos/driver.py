"""``ray-trainer train`` as a process of its own, watched through what its run writes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from ray_trainer.chaos.processes import Identity, command_line, descendants, end, identity, is_alive
from ray_trainer.errors import RunError
from ray_trainer.metrics import read_events
from ray_trainer.metrics.jsonl import Row, read_rows
from ray_trainer.storage import Storage

T = TypeVar("T")

_PATIENCE_S = 900.0  # for anything that a run does between two steps, its start included
_LOOKS_EVERY_S = 0.005
_LINES_SHOWN = 15


class RunIsOver(Exception):  # noqa: N818 - no error: what was to be done to the run came too late
    """The command has ended well."""


class Driver:
    """The command of a run, started as often as it takes; nothing of it is alive afterwards.

    Args:
        arguments: of ``ray-trainer``.
        run: the directory of its run.
    """

    def __init__(self, arguments: Sequence[str], run: Storage) -> None:
        self._command = [sys.executable, "-m", "ray_trainer", *arguments]
        self._run = run
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[Identity] = set()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End whatever is left."""
        self.kill_everything()
        self._log.close()

    def start(self) -> None:
        """Give the command; in a session of its own, so that a Ctrl-C is not meant for it."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def exit_code(self) -> int | None:
        """Of the last start; None while it runs."""
        return self._started().poll()

    def wait(self) -> int:
        """Until the last start ends; its exit code.

        Raises:
            RunError: it does not end.
        """
        return self.until(lambda: self._started().poll(), "the end of the command", expects_end=True)

    def send(self, number: signal.Signals) -> None:
        """A signal to the driver alone."""
        self._family()  # seen, before its death makes them orphans
        self._started().send_signal(number)

    def kill_everything(self) -> None:
        """SIGKILL to the driver and to all that it and its Ray have started."""
        if self._process is None:
            return
        self._family()
        self._process.kill()  # first, so that it tells of no other one's end
        end(self._seen)
        self._process.wait()
        self._seen = set()

    def worker(self, rank: int) -> Identity:
        """The process of a rank, of those that were started last."""

        def find() -> Identity | None:
            started = self.events("workers_started")
            pids = started[-1]["pids"] if started else []
            pid = int(pids[rank]) if rank < len(pids) else -1
            return identity(pid) if pid in self._named("ray::RayTrainWorker") else None

        return self.until(find, f"the worker of rank {rank}")

    def controller(self) -> Identity:
        """The process of Ray's controller of the run."""

        def find() -> Identity | None:
            pids = self._named("ray::TrainController")
            return identity(pids[0]) if len(pids) == 1 else None

        return self.until(find, "Ray's controller")

    def num_workers(self) -> int:
        """How many there are."""
        return len(self.until(lambda: self.events("workers_started") or None, "the workers")[-1]["pids"])

    def signal(self, process: Identity, number: signal.Signals) -> None:
        """A signal to a process of the run.

        Raises:
            RunIsOver: it is gone by itself.
        """
        if not is_alive(process):
            raise RunIsOver
        os.kill(process.pid, number)

    def events(self, *names: str, since: float = 0.0) -> list[Row]:
        """Of the run, oldest first."""
        return [row for row in read_events(self._run) if row["event"] in names and row["time"] > since]

    def steps(self) -> list[Row]:
        """The rows of metrics of its steps, oldest first."""
        return [row for row in read_rows(self._run, "metrics.jsonl") if row["split"] == "train"]

    def newest_step(self) -> int:
        """The last one that it has told of."""
        return int(max((row["step"] for row in self.steps()), default=0))

    def until(self, look: Callable[[], T | None], what: str, expects_end: bool = False) -> T:
        """What is looked for, once it is there.

        Args:
            look: finds it, or not yet.
            what: it is.
            expects_end: that the command ends meanwhile is no failure.

        Raises:
            RunError: it never comes, or the command has failed.
            RunIsOver: the command has ended well without it.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            code = None if expects_end else self.exit_code
            before = time.monotonic()
            found = look()
            if found is not None:
                return found
            if code == 0:
                raise RunIsOver
            if code is not None:
                raise RunError(f"The command ended with exit code {code}:\n{self.told()}")
            took_s = time.monotonic() - before
            time.sleep(max(_LOOKS_EVERY_S, 10 * took_s))  # looking must not be what the machine does
        raise RunError(f"Waited in vain for {what}, {_PATIENCE_S:.0f} s:\n{self.told()}")

    def told(self) -> str:
        """The last lines that it has printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LINES_SHOWN:])

    def _started(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None  # on entering
        return self._process

    def _named(self, name: str) -> list[int]:
        return [pid for pid in self._family() if command_line(pid).startswith(name)]

    def _family(self) -> list[int]:
        """The driver and all that descend from it; also remembered, because its death makes them orphans."""
        family = descendants(self._started().pid)
        self._seen |= {identity(pid) for pid in family}
        return family
