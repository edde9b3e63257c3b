"""What takes for ever, for processes beside a training: they import it without torch."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_trainer.storage import Buffer, Storage
from ray_trainer.storage.beside import ProcessBeside


def stop_for_good(process: ProcessBeside) -> int:
    """Let a process stand still while its parent's clock, as far as this process goes, runs away; its id."""
    ahead_s = itertools.count(time.monotonic(), 200.0)
    process._clock = lambda: next(ahead_s)
    os.kill(process.pid, signal.SIGSTOP)
    return process.pid


@dataclass(frozen=True)
class InSteps:
    """A job that goes on each time that the next file of a directory appears, then never ends."""

    directory: Path
    steps: int

    def __call__(self, memory: memoryview, goes_on: Callable[[], None]) -> None:
        for step in range(self.steps):
            while not (self.directory / f"go{step}").exists():
                time.sleep(0.001)
            goes_on()
            (self.directory / f"gone{step}").touch()
        time.sleep(1000)


class StallingStorage(Storage):
    """Takes no file of a checkpoint of a step after the second, and never says no."""

    def write_chunks(self, name: str, chunks: Iterable[Buffer]) -> None:
        if "_step0000" in self.path and int(self.path[-8:]) > 2:
            time.sleep(1000)
        super().write_chunks(name, chunks)
