"""Which process holds something, in a form that another process, here or elsewhere, can judge."""

import getpass
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Holder:
    """A process.

    Attributes:
        host: the name of its machine.
        machine: tells where its number has a meaning: this start of that kernel, and the namespace of processes.
            Empty where the system does not say.
        pid: its number.
        started: tells it from a later process with the same number; empty where the system does not say.
        user: whose it is.
        job: what it was started as, such as the number of a Ray or Slurm job.
    """

    host: str
    machine: str
    pid: int
    started: str
    user: str
    job: str = ""

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _state_and_start(pid)[1], _user(), _job())

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """The reverse of `to_dict`; what is missing is empty."""
        texts = {name: str(document.get(name, "")) for name in ("host", "machine", "started", "user", "job")}
        return cls(pid=int(document.get("pid", 0)), **texts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def is_known_to_be_dead(self) -> bool:
        """Whether it ran on this machine and does not any more; False where that can't be told."""
        if not self.machine or self.machine != _machine():
            return False
        state, started = _state_and_start(self.pid)
        return started != self.started or state in ("Z", "X")

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux: the lease has to expire
        return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """Of a process of this machine; both empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}" if sys.platform != "win32" else "unknown"


def _job() -> str:
    """What the cluster calls this process, for a human who looks for it."""
    for name, title in (("RAY_JOB_SUBMISSION_ID", "Ray job"), ("SLURM_JOB_ID", "Slurm job")):
        if value := os.environ.get(name):
            return f"{title} {value}"
    return ""
