"""Who brings the files of a checkpoint to storage: this process, or one beside it while training goes on."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ray_trainer import distributed
from ray_trainer.checkpoint.arena import Arena
from ray_trainer.checkpoint.images import FileImage, copy_in, lay_out
from ray_trainer.storage import Storage
from ray_trainer.storage.beside import Job, ProcessBeside
from ray_trainer.storage.sealing import Seal, WriteFiles, write_hashed

#: Less than this is on a local disk sooner than it is handed over.
SMALL_BYTES = 4 << 20
#: Storage that takes nothing for so long is lost: what fails is given up after a minute (see `storage.patience`).
STALLS_AFTER_S = 300.0


class Writer(Protocol):
    """Carries out one job at a time; what goes wrong in one is raised where its result is collected."""

    def write(self, directory: Storage, images: Sequence[FileImage]) -> None:
        """Begin to write files. What they show has been taken when this returns."""

    def seal(self, seal: Seal) -> None:
        """Begin to declare a directory whole."""

    def is_done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> Any:
        """What the job returned; waits for it."""


class DirectWriter:
    """Does everything at once, in this process, from the live state."""

    def __init__(self) -> None:
        self._job: Callable[[], Any] | None = None

    def write(self, directory: Storage, images: Sequence[FileImage]) -> None:
        """See `Writer`; carried out when the result is collected, before anything else happens."""
        self._job = lambda: {image.name: write_hashed(directory, image.name, image.chunks) for image in images}

    def seal(self, seal: Seal) -> None:
        """See `Writer`."""
        self._job = seal

    def is_done(self) -> bool:
        """See `Writer`."""
        return True

    def result(self) -> Any:
        """See `Writer`."""
        assert self._job is not None  # one was begun
        return self._job()


class BackgroundWriter:
    """Copies files into memory that is used again and again; a process beside this one does the rest."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._process: ProcessBeside | None = None
        self._preparation: threading.Thread | None = None
        self._error: Exception | None = None

    def prepare(self, size_bytes: int) -> None:
        """Allocate the memory while training goes on; the first snapshot would have to wait for it."""
        if self._arena is not None:
            return  # a snapshot was sooner: the process beside sees that memory, and no other
        self._preparation = threading.Thread(target=self._prepare, args=(size_bytes,), daemon=True)
        self._preparation.start()

    def write(self, directory: Storage, images: Sequence[FileImage]) -> None:
        """See `Writer`."""
        self._error = None
        try:
            self._write(directory, images)
        except Exception as error:  # as when memory runs out; raised with the result, on all ranks
            self._error = error

    def seal(self, seal: Seal) -> None:
        """See `Writer`."""
        try:
            self._submit(seal)
        except Exception as error:  # as above
            self._error = error

    def is_done(self) -> bool:
        """See `Writer`; costs a look at a pipe."""
        return self._error is not None or self._process is None or self._process.is_done()

    def result(self) -> Any:
        """See `Writer`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert self._process is not None  # a job was begun
        return self._process.result()  # of the very process that was given it, also where that has ended

    def close(self) -> None:
        """End the process and free the memory; a job in progress is given up."""
        self._join()
        if self._process is not None:
            self._process.close()
        if self._arena is not None:
            self._arena.close()
        self._process = self._arena = None

    def _write(self, directory: Storage, images: Sequence[FileImage]) -> None:
        self._join()
        places, size_bytes = lay_out(images)
        copy_in(images, places, self._room_for(size_bytes))
        self._submit(WriteFiles(directory, tuple(places)))

    def _submit(self, job: Job) -> None:
        """Other ranks wait for this one: it gives up before they do."""
        self._started().submit(job, min(STALLS_AFTER_S, distributed.patience_s() / 2))

    def _room_for(self, size_bytes: int) -> torch.Tensor:
        if self._arena is None or self._arena.size_bytes < size_bytes:
            self.close()
            self._arena = Arena(size_bytes)
        return self._arena.memory

    def _started(self) -> ProcessBeside:
        assert self._arena is not None  # files are written before anything is sealed
        if self._process is None or self._process.has_ended():
            self._process = ProcessBeside(self._arena.descriptor)
        return self._process

    def _prepare(self, size_bytes: int) -> None:
        try:
            self._arena = Arena(size_bytes)
        except OSError:
            self._arena = None  # tried again, and told, with the first snapshot

    def _join(self) -> None:
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None
