"""Creating a file so that of several who try at the same time exactly one succeeds."""

import errno
import os
import re
import time
import uuid
from pathlib import Path

from ray_trainer.storage.directory import Storage
from ray_trainer.storage.naming import naming

#: Object stores tell the time of an object in whole seconds: later ones must be seen to be later.
SETTLE_S = 1.5

_NAME = re.compile(r"(\d{8,})(?:\.([0-9a-f]{32}))?\.json")


def numbered_files(place: Storage) -> dict[int, str]:
    """The numbers that were created in a directory, and the names of their files, from the least on.

    On an object store several may have tried; the earliest object is the one that counts.
    """
    earliest: dict[int, tuple[int, str]] = {}
    for name, modified_ns in place.modified_ns().items():
        if match := _NAME.fullmatch(name):
            number = int(match[1])
            earliest[number] = min(earliest.get(number, (modified_ns, name)), (modified_ns, name))
    return {number: name for number, (_, name) in sorted(earliest.items())}


def create_number(place: Storage, number: int, data: bytes) -> str | None:
    """Create the file of a number; its name, or None if somebody else was faster.

    On a local disk and on NFS a hard link decides, which the file system makes for one only; where it has no
    links, an exclusive open does. pyarrow offers no conditional writes to object stores, so there each writes an
    object of its own, waits, and the earliest by the store's clock has won. What remains: an object that takes
    longer than `SETTLE_S` to appear while its time is that of its beginning.
    """
    if place.is_local:
        name = f"{number:08d}.json"
        return name if _create_local(place, name, data) else None
    name = f"{number:08d}.{uuid.uuid4().hex}.json"
    place.write(name, data)
    time.sleep(SETTLE_S)
    if numbered_files(place).get(number) == name:
        return name
    place.delete(name)
    return None


def _create_local(place: Storage, name: str, data: bytes) -> bool:
    unfinished = f".{name}.{uuid.uuid4().hex}.tmp"
    place.write(unfinished, data)
    source, target = place.local_path(unfinished), place.local_path(name)
    try:
        with naming(target):
            return _link(source, target, data)
    finally:
        source.unlink(missing_ok=True)
        place.sync()


def _link(source: Path, target: Path, data: bytes) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return source.stat().st_nlink == 2  # NFS: the link was made and the answer lost
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _open_exclusively(target, data)
    return True


def _open_exclusively(target: Path, data: bytes) -> bool:
    try:
        with target.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
