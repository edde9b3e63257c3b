"""A directory that may be on the local disk, NFS or an object store, and what may be done in it.

A file is written whole or not at all, so a reader never sees half of one on a file system that keeps its
promises. What a crash or a broken disk leaves is for the reader's checksums to find. A failure that may pass is
tried again for a while (see `patience`).
"""

import copy
import errno
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from pyarrow import fs as pafs

from ray_trainer.storage import local, objects
from ray_trainer.storage.fence import NO_FENCE, Fence
from ray_trainer.storage.local import Buffer
from ray_trainer.storage.naming import naming
from ray_trainer.storage.patience import IMPATIENT, PATIENT, Patience
from ray_trainer.storage.reading import PatientReader

T = TypeVar("T")

_BLOCK_BYTES = 16 << 20
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


class Storage:
    """A directory on any file system that pyarrow opens: local disk, NFS, ``s3://``, ``gs://``.

    Opening one touches nothing; the directory comes into being with the first file written. Errors are
    ``OSError`` with the number of the system and the full name of the file.

    Attributes:
        filesystem: where it is.
        path: the directory's path within ``filesystem``.
        is_local: it is a path of this machine (NFS included): can append, rename and fsync.
        fence: asked before anything in it is changed; see `fenced`.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str, uri_frame: tuple[str, str] = ("", "")) -> None:
        self.filesystem = filesystem
        self.path = path
        self.is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self.fence: Fence = NO_FENCE
        self._patience = PATIENT
        self._uri_frame = uri_frame

    @classmethod
    def open(cls, location: str | os.PathLike[str]) -> Self:
        """The directory at a local path or a URI; it need not exist.

        Raises:
            ConfigError: no file system is known for the URI's scheme.
        """
        text = os.fspath(location)
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), _absolute(text))
        filesystem, path = objects.filesystem_of(text)
        if isinstance(filesystem, pafs.LocalFileSystem):
            return cls(filesystem, _absolute(path))
        before, _, query = text.partition("?")
        prefix = before.rstrip("/").removesuffix(path.strip("/"))
        return cls(filesystem, path.rstrip("/"), (objects.without_secret(prefix), query and f"?{query}"))

    @classmethod
    def of(cls, filesystem: pafs.FileSystem, path: str) -> Self:
        """The directory at a path of an open file system, as Ray's ``storage_filesystem`` is one."""
        while isinstance(filesystem, pafs.SubTreeFileSystem):
            path = f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}"
            filesystem = filesystem.base_fs
        if isinstance(filesystem, pafs.LocalFileSystem):
            return cls(filesystem, _absolute(path))
        path = path.rstrip("/")
        return cls(filesystem, path, (f"{objects.scheme_of(filesystem)}://", ""))

    @property
    def uri(self) -> str:
        """What a user can read and give back: an absolute local path, or a URI without credentials."""
        before, after = self._uri_frame
        path = self.path.lstrip("/") if before else self.path
        return f"{before}{path}{after}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def child(self, name: str) -> Self:
        """The directory ``name`` in this one."""
        child = copy.copy(self)
        child.path = self._at(name)
        return child

    def fenced(self, fence: Fence) -> Self:
        """The same directory, in which nothing is changed any more once the fence says no."""
        fenced = copy.copy(self)
        fenced.fence = fence
        return fenced

    def with_patience(self, patience: Patience) -> Self:
        """The same directory, in which what fails is tried again for longer or shorter."""
        other = copy.copy(self)
        other._patience = patience
        return other

    def impatient(self) -> Self:
        """The same directory, with failures raised at once: for who has something better to do than to wait."""
        return self.with_patience(IMPATIENT)

    def local_path(self, name: str = "") -> Path:
        """Where the directory, or a file in it, is on this machine.

        Raises:
            io.UnsupportedOperation: it is not on this machine.
        """
        if not self.is_local:
            raise io.UnsupportedOperation(f"{self.uri} is not a local directory.")
        return Path(self._at(name))

    def write(self, name: str, data: Buffer) -> None:
        """Write a file whole or not at all, replacing one of that name; missing directories are made.

        Locally it has reached the disk on return, as has its name.
        """
        self.write_chunks(name, (data,))

    def write_chunks(self, name: str, chunks: Iterable[Buffer]) -> None:
        """As `write`, from pieces, so that a large file need not be in memory as one.

        Pieces that can be had only once, from a generator, are not tried again.
        """

        def write() -> None:
            self.fence.check()
            if self.is_local:
                local.write(Path(path), chunks, before_it_is_visible=self.fence.check)
            else:
                objects.write(self.filesystem, path, chunks)

        path = self._at(name)
        is_repeatable = iter(chunks) is not chunks
        self._attempt(write, path, self._patience if is_repeatable else IMPATIENT)

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of a local file in one call to the system, so that lines of two writers stay whole.

        Raises:
            io.UnsupportedOperation: the file system can't append.
        """
        self.fence.glance()
        local.append(self.local_path(name), data, before_it_is_made=self.fence.check)

    def read(self, name: str) -> bytes:
        """The content of a file; ``FileNotFoundError`` if there is none."""
        return b"".join(self.blocks(name, block_bytes=-1))

    def blocks(self, name: str, block_bytes: int = _BLOCK_BYTES) -> Iterator[bytes | memoryview]:
        """The content of a file, piece by piece; one piece if ``block_bytes`` is negative."""
        path = self._at(name)
        reader = PatientReader(lambda position: self._open_at(path, position), self._patience, path)
        with naming(path), closing(reader):
            while block := reader.read(None if block_bytes < 0 else block_bytes):
                yield block

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or directory of that name; by default, whether this directory is there."""
        return bool(self._info(name).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int:
        """The size of a file in bytes; ``FileNotFoundError`` if there is none."""
        info = self._info(name)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._at(name))
        return int(info.size)

    def list(self) -> list[str]:
        """The names of files and directories in this one, sorted; none if it is missing."""
        return sorted(self.modified_ns())

    def modified_ns(self) -> dict[str, int]:
        """The names as in `list`, and when each was last written by the clock of the storage; 0 if it has none."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = self._attempt(lambda: self.filesystem.get_file_info(selector), self.path)
        return {info.base_name: info.mtime_ns or 0 for info in found if not _UNFINISHED.fullmatch(info.base_name)}

    def delete(self, name: str = "") -> None:
        """Remove a file or a whole directory; one that is missing is fine."""

        def delete() -> None:
            self.fence.check()
            if self.is_local:
                local.delete(Path(path))
            else:
                objects.delete(self.filesystem, path)

        path = self._at(name)
        with suppress(FileNotFoundError):
            self._attempt(delete, path)

    def move(self, name: str, new_name: str) -> None:
        """Give a file or directory another name within this one.

        An object store copies and deletes, which is not atomic: what is moved may be there twice for a while.

        Raises:
            FileExistsError: the new name is taken.
        """
        source, target = self._at(name), self._at(new_name)
        if self.exists(new_name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)

        def move() -> None:
            self.fence.check()
            if self.is_local:
                local.make_directory(Path(target).parent)
                Path(source).rename(target)
                self.sync()
            else:
                objects.move(self.filesystem, source, target)

        self._attempt(move, source)

    def sync(self) -> None:
        """Make the names in this directory durable. Object stores do so by themselves."""
        if self.is_local:
            local.sync_directory(self.local_path())

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _info(self, name: str) -> Any:
        path = self._at(name)
        return self._attempt(lambda: self.filesystem.get_file_info(path), path)

    def _attempt(self, action: Callable[[], T], path: str, patience: Patience | None = None) -> T:
        def named() -> T:
            with naming(path):
                return action()

        return (patience or self._patience).attempt(named, path)

    def _open_at(self, path: str, position: int) -> Any:
        if self.is_local:
            file: Any = Path(path).open("rb")  # noqa: SIM115 -- whoever reads it closes it
        elif position == 0:
            return self.filesystem.open_input_stream(path)
        else:
            file = self.filesystem.open_input_file(path)
        file.seek(position)
        return file


def _absolute(path: str) -> str:
    return os.path.normpath(Path(path).expanduser().absolute())
