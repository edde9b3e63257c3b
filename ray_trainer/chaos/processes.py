"""Processes of this machine, seen through /proc and told apart by number and time of start. Linux only."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_DIES_WITHIN_S = 30.0


class Identity(NamedTuple):
    """A process, and no later one with its number."""

    pid: int
    started: str


def identity(pid: int) -> Identity:
    """Of the process that has this number now."""
    fields = _stat(pid)
    return Identity(pid, fields[19] if fields else "")


def is_alive(process: Identity) -> bool:
    """Whether it still runs; a zombie does not."""
    fields = _stat(process.pid)
    return bool(fields) and fields[19] == process.started and fields[0] not in ("Z", "X")


def is_stopped(process: Identity) -> bool:
    """Whether SIGSTOP holds it."""
    fields = _stat(process.pid)
    return bool(fields) and fields[19] == process.started and fields[0] == "T"


def descendants(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def command_line(pid: int) -> str:
    """Its arguments, separated by NUL; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def kill(pid: int) -> None:
    """As ``kill -9``; returns when the process is gone.

    Raises:
        ProcessLookupError: there is no such process.
        TimeoutError: it survived.
    """
    process = identity(pid)
    os.kill(pid, signal.SIGKILL)
    _wait_for_end({process})


def end(processes: set[Identity]) -> None:
    """SIGKILL to those that are still alive; returns when they are gone.

    Raises:
        TimeoutError: one survived.
    """
    for process in processes:
        if is_alive(process):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    _wait_for_end(processes)


def _wait_for_end(processes: set[Identity]) -> None:
    deadline = time.monotonic() + _DIES_WITHIN_S
    while left := sorted(process.pid for process in processes if is_alive(process)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} survived SIGKILL for {_DIES_WITHIN_S:.0f} s")
        time.sleep(0.002)


def _stat(pid: int) -> list[str]:
    """Of /proc/PID/stat, the fields after the name: state, parent, ...; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
