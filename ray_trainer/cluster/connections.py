"""The TCP connections of a process group, so that a rank that gives it up can hang up on the others.

``destroy_process_group`` closes nothing as long as a `DistributedDataParallel` or a failed collective refers to the
group, and gloo has no way to abort one (torch 2.13). So a rank that waits for one that is alive, but has lost a third
one and gone on, would wait for as long as collectives may take.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ray_trainer import distributed

_OPEN_FILES = Path("/proc/self/fd")


class Connection(NamedTuple):
    """A connected socket of this process.

    Attributes:
        descriptor: of the file.
        identity: tells it from a later one with the same descriptor.
        ends: addresses of this end and of the other.
    """

    descriptor: int
    identity: str
    ends: tuple[tuple[str, int], tuple[str, int]]


def open_connections() -> set[Connection]:
    """All of this process; none on systems without ``/proc``."""
    if not _OPEN_FILES.exists():
        return set()
    return {connection for file in _OPEN_FILES.iterdir() if (connection := _connection(int(file.name)))}


def connections_between_ranks(before: set[Connection]) -> set[Connection]:
    """Those opened since ``before`` whose other end is another rank's. Collective."""
    opened = open_connections() - before
    ends = {ends for of_rank in distributed.gather_objects([each.ends for each in opened]) for ends in of_rank}
    return {connection for connection in opened if connection.ends[::-1] in ends}


def hang_up(connections: set[Connection]) -> None:
    """Let the other ends know at once that nothing comes any more."""
    for connection in connections:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as end:
            if _identity(end.fileno()) == connection.identity:  # of the copy: the number may be another's by now
                end.shutdown(socket.SHUT_RDWR)


def _connection(descriptor: int) -> Connection | None:
    try:
        identity = _identity(descriptor)
        if not identity.startswith("socket:"):
            return None
        with socket.socket(fileno=os.dup(descriptor)) as end:
            if end.family not in (socket.AF_INET, socket.AF_INET6) or end.type != socket.SOCK_STREAM:
                return None
            return Connection(descriptor, identity, (_address(end.getsockname()), _address(end.getpeername())))
    except OSError:  # closed meanwhile, or not connected
        return None


def _address(name: tuple[str, int]) -> tuple[str, int]:
    return name[0].removeprefix("::ffff:"), name[1]


def _identity(descriptor: int) -> str:
    return str((_OPEN_FILES / str(descriptor)).readlink())
