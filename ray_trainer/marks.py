"""Where each process is in its step, in memory that outlives it: what a process died at, others find there."""

import logging
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ray_trainer import distributed
from ray_trainer.shortage import kernel_kills
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_FOLDER = ".steps"
#: In no pass, in the forward pass, in the backward pass; out of one because another rank was lost.
NOWHERE, FORWARD, BACKWARD, BEREFT = range(4)


class Mark(NamedTuple):
    """Where a process is: eight bytes each in a file.

    Attributes:
        attempt: start of the run.
        epoch, step_in_epoch, step: completed ones.
        world_size, rank: of the process.
        micro_batch: which of the rank's, from 0.
        phase: see above.
        machine: on which it is.
        kernel_kills: processes that the kernel of the machine has ended for want of memory; of a mark that was
            found, since the process began, as far as it was found on that machine.
    """

    attempt: int
    epoch: int
    step_in_epoch: int
    step: int
    world_size: int
    rank: int
    micro_batch: int
    phase: int
    machine: int = 0
    kernel_kills: int = 0


_FORM = struct.Struct("<10q")
_MOVING = struct.Struct("<8q")  # of it: what changes from step to step


class Marks:
    """The marks of a run's processes: in its directory, or where that is not of this machine, beside it.

    Those on a node are found by whoever is started there next. A node that is lost takes them with it, but then it was
    no batch that ended the process.

    Args:
        storage: of the run.
        is_on: nothing is kept otherwise.
    """

    def __init__(self, storage: Storage, is_on: bool) -> None:
        self._folder = storage.local_path(_FOLDER) if storage.is_local else _beside(storage.uri)
        self._is_on = is_on
        self._file: mmap.mmap | None = None

    def left_before(self, attempt: int) -> list[Mark]:
        """Those of the newest attempt that left any before this one, in the order of ranks. Collective."""
        if not self._is_on:
            return []
        with distributed.same_error_everywhere():
            here = _found(self._folder) if attempt > 1 else []
        seen = [mark for marks in distributed.gather_objects(here) for mark in marks]
        found = {mark.rank: mark for mark in sorted(seen, key=lambda mark: mark.kernel_kills)}
        newest = max((mark.attempt for mark in found.values() if mark.attempt < attempt), default=0)
        return [mark for _, mark in sorted(found.items()) if mark.attempt == newest]

    @contextmanager
    def kept(self, attempt: int) -> Iterator[None]:
        """Keep this process's marks inside, and no earlier ones, which all ranks must have read.

        The last one stays where the process dies, or leaves with an error.
        """
        if not self._is_on:
            yield
            return
        path = self._folder / f"{attempt}-{distributed.rank()}"
        try:
            self._file = self._open(path, attempt)
        except OSError as error:  # they are wanted only if something goes wrong as well
            logger.warning("At which batch a process dies will not be known: %s", error)
        try:
            yield
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
        with suppress(OSError):
            path.unlink()
            self._folder.rmdir()  # by the last one

    def _open(self, path: Path, attempt: int) -> mmap.mmap:
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.glob("*-*"):
            number = int(other.name.partition("-")[0])
            is_of_earlier_run = attempt == 1 < number
            if number < attempt or is_of_earlier_run:  # else this process may be the one that is late
                other.unlink(missing_ok=True)
        path.write_bytes(_FORM.pack(*[0] * 8, _machine(), kernel_kills()))
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), _FORM.size)

    @property
    def are_kept(self) -> bool:
        """Whether `put` is of any use."""
        return self._file is not None

    def put(self, mark: Mark) -> None:
        """Where this process is now."""
        if self._file is not None:
            _MOVING.pack_into(self._file, 0, *mark[:8])


def to_blame(marks: Sequence[Mark]) -> list[Mark]:
    """Of the processes of an attempt, those that may have died of their batch.

    Those in the backward pass wait for each other. So if another one was elsewhere, it is that one that has died;
    if that was between two passes, of something else than a batch. One that left its pass for want of another is
    alive, and says nothing.
    """
    forward = [mark for mark in marks if mark.phase == FORWARD]
    backward = [mark for mark in marks if mark.phase == BACKWARD]
    bereft = [mark for mark in marks if mark.phase == BEREFT]
    are_all_there = bool(backward) and len(backward) + len(bereft) == backward[0].world_size
    return forward or (backward if are_all_there else [])


def ended_for_memory(marks: Iterable[Mark], events: Iterable[Mapping[str, Any]]) -> list[Mark]:
    """Of the processes of an attempt, those that died in a pass because the kernel, or Ray, wanted their memory.

    Args:
        marks: that were left.
        events: of the run; those of failures name the ranks that Ray has ended.
    """
    by_ray = {
        (event["attempt"], rank)
        for event in events
        if event["event"] == "failure"
        for rank in event.get("out_of_memory", ())
    }
    dead = [mark for mark in marks if mark.phase in (FORWARD, BACKWARD)]
    return [mark for mark in dead if mark.kernel_kills > 0 or (mark.attempt, mark.rank) in by_ray]


def _beside(uri: str) -> Path:
    """A folder of this user and run in the temporary directory of the node."""
    return Path(tempfile.gettempdir(), f"ray-trainer-{os.getuid()}", sha256(uri.encode()).hexdigest()[:16])


def _machine() -> int:
    """A number of this machine, the same for all processes until it starts anew; 0 where it has none."""
    try:
        return int.from_bytes(sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).digest()[:7])
    except OSError:
        return 0


def _found(folder: Path) -> list[Mark]:
    machine, kills = _machine(), kernel_kills()
    found: list[Mark] = []
    for path in folder.glob("*-*"):
        try:
            mark = Mark._make(_FORM.unpack(path.read_bytes()))
        except (OSError, struct.error) as error:  # it was being made, or is somebody else's
            logger.debug("A mark could not be read: %s", error)
        else:
            found.append(mark._replace(kernel_kills=kills - mark.kernel_kills if mark.machine == machine else 0))
    return found
