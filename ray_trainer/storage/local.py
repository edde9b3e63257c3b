"""Files of this machine, durable once written."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ray_trainer.errors import ConfigError
from ray_trainer.storage.naming import naming

Buffer = bytes | memoryview

#: Pieces of this many bytes or more, and of whole blocks, go to the disk past the page cache.
_LARGE_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_PAST_THE_CACHE: int = getattr(os, "O_DIRECT", 0)  # Linux

_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def write(path: Path, chunks: Iterable[Buffer], before_it_is_visible: Callable[[], None]) -> None:
    """Write a file under another name, and give it its own once it has reached the disk.

    Args:
        path: its own.
        chunks: its content.
        before_it_is_visible: called last; may raise, and nothing is left then.
    """
    make_directory(path.parent)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), unfinished.open("xb", buffering=0) as file:
            for chunk in chunks:
                _write(file.fileno(), chunk)
            os.fsync(file.fileno())
        before_it_is_visible()
        unfinished.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync_directory(path.parent)


def append(path: Path, data: bytes, before_it_is_made: Callable[[], None]) -> None:
    """Add to the end of a file in one call to the system, so that the lines of two writers stay whole.

    Args:
        path: of the file.
        data: what is added.
        before_it_is_made: called before a missing directory is made; may raise.
    """
    with naming(path):
        try:
            descriptor = os.open(path, _APPENDING, 0o666)
        except FileNotFoundError:
            before_it_is_made()
            make_directory(path.parent)
            descriptor = os.open(path, _APPENDING, 0o666)
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def overwrite(path: Path, data: bytes) -> None:
    """Write over a file of the same size in its place, which takes no room on a disk that is full."""
    with naming(path), path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def delete(path: Path) -> None:
    """Remove a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(descriptor: int, piece: Buffer) -> None:
    """Write a piece, past the page cache if it is large and file system and place in memory allow that.

    That way a disk is fed by its controller: the copy into the page cache, which costs a training beside it
    cores and memory bandwidth, is spared.
    """
    buffered = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_PAST_THE_CACHE
    is_direct = len(piece) >= _LARGE_BYTES and len(piece) % _BLOCK_BYTES == 0
    rest = memoryview(piece)
    while rest:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, buffered | _PAST_THE_CACHE if is_direct else buffered)
            rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:
                raise
            is_direct = False


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    with naming(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync files only
                raise
        finally:
            os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents so that their names survive a power cut."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def refuse_unwritable(directory: Path, setting: str) -> None:
    """Refuse a place where nothing can be kept, as far as that can be seen without writing.

    Args:
        directory: need not exist.
        setting: that names it.

    Raises:
        ConfigError: it is below a file, or in a directory that this user may not write in.
    """
    there = next(place for place in (directory, *directory.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(f"{setting}: {there} {what}. Name a directory in which the run may write.")
