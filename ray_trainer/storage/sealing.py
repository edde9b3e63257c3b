"""A directory of files that is whole or nothing: its files, then one that says what they are, written last.

Nothing here needs torch: it also runs in the process beside a training.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from ray_trainer.errors import CheckpointError
from ray_trainer.storage.directory import Storage
from ray_trainer.storage.local import Buffer

logger = logging.getLogger(__name__)

#: The manifest of a directory that is being deleted, under another name: what is left of it was let go on purpose.
OBSOLETE = "obsolete.json"
_CHUNK_BYTES = 16 << 20


class WrittenFile(NamedTuple):
    """What was written.

    Attributes:
        size: in bytes.
        xxh3_128: checksum of the content, hexadecimal.
    """

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class FileInMemory:
    """The content of a file, at a place of a memory that is shared."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class WriteFiles:
    """A job: bring files from memory to storage; returns what was written, by name."""

    directory: Storage
    files: tuple[FileInMemory, ...]

    def __call__(self, memory: memoryview, goes_on: Callable[[], None]) -> dict[str, WrittenFile]:
        """Write them, each whole or not at all; those already written stay where one fails."""
        return {file.name: self._write(file, memory, goes_on) for file in self.files}

    def _write(self, file: FileInMemory, memory: memoryview, goes_on: Callable[[], None]) -> WrittenFile:
        content = memory[file.offset : file.offset + file.size_bytes]

        def chunks() -> Iterator[memoryview]:
            for start in range(0, len(content), _CHUNK_BYTES):
                yield content[start : start + _CHUNK_BYTES]
                goes_on()  # the one before is taken when the next one is asked for

        written = write_hashed(self.directory, file.name, chunks)
        goes_on()
        return written


@dataclass(frozen=True)
class Seal:
    """A job: declare a directory whole, then let go of others.

    Attributes:
        run: where the directories are.
        name: of the directory.
        sizes: of the files that have to be in it, in bytes.
        manifest: name and content of the file that is written last.
        obsolete: directories that are deleted once this one is whole.
    """

    run: Storage
    name: str
    sizes: dict[str, int]
    manifest: tuple[str, bytes]
    obsolete: tuple[str, ...] = ()

    def __call__(self, memory: memoryview | None = None, goes_on: Callable[[], None] = lambda: None) -> "Sealed":
        """Write the manifest.

        Raises:
            CheckpointError: a file is missing or has another size.
        """
        directory = self.run.child(self.name)
        problems = []
        for name, size in self.sizes.items():
            problems += _problems(directory, name, size)
            goes_on()
        if problems:
            raise CheckpointError(
                f"Files that were written are not there: {'; '.join(problems)}. "
                f"Is {self.run.uri} the same storage on every node?"
            )
        directory.sync()
        name, content = self.manifest
        directory.write(name, content)
        at_s = time.monotonic()
        return Sealed(at_s, tuple(each for each in self.obsolete if self._discard(each, goes_on)))

    def _discard(self, name: str, goes_on: Callable[[], None]) -> bool:
        goes_on()
        try:
            discard(self.run, name, self.manifest[0])
        except OSError as error:
            logger.warning("Checkpoint %s could not be deleted: %s", name, error)
            return False
        return True


class Sealed(NamedTuple):
    """What came of a `Seal`.

    Attributes:
        at_s: when the directory was whole, on the monotonic clock, which all processes of a machine share.
        deleted: which directories are gone.
    """

    at_s: float
    deleted: tuple[str, ...]


def write_hashed(directory: Storage, name: str, chunks: Callable[[], Iterator[Buffer]]) -> WrittenFile:
    """Write one file whole or not at all, hashing it on its way."""
    content = _Hashed(chunks)
    directory.write_chunks(name, content)
    return WrittenFile(content.size_bytes, content.digest.hexdigest())


def discard(run: Storage, name: str, manifest_name: str) -> None:
    """Delete a directory: half of one that is being deleted is never taken for whole, nor for one that was lost."""
    directory = run.child(name)
    if not directory.exists():
        return
    if directory.exists(OBSOLETE):
        directory.delete(manifest_name)  # an object store may have been interrupted while it moved it
        directory.sync()
    elif directory.exists(manifest_name):
        directory.move(manifest_name, OBSOLETE)
    for file in directory.list():
        if file != OBSOLETE:
            directory.delete(file)
    run.delete(name)


class _Hashed:
    """A file's content, hashed as it is read; starts again if a storage that retries reads it again."""

    def __init__(self, chunks: Callable[[], Iterator[Buffer]]) -> None:
        self._chunks = chunks
        self.digest = xxhash.xxh3_128()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[Buffer]:
        self.digest.reset()
        self.size_bytes = 0
        for chunk in self._chunks():
            self.digest.update(chunk)
            self.size_bytes += len(chunk)
            yield chunk


def _problems(directory: Storage, name: str, expected: int) -> list[str]:
    try:
        size = directory.size(name)
    except FileNotFoundError:
        return [f"{name} is missing"]
    return [] if size == expected else [f"{name} has {size} bytes instead of {expected}"]
