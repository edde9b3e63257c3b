"""What is right and wrong with a machine, a storage and a cluster, each with what to do about it."""

import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ray_trainer.cluster.nodes import NodeFacts
from ray_trainer.cluster.working_dir import readable_size
from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage

State = Literal["ok", "note", "wrong"]

MAX_CLOCK_OFFSET_S = 1.0
OBJECT_STORE_SHARE = 0.3  # of the memory: what Ray takes of /dev/shm by default
FULLEST_DISK = 0.95  # beyond which Ray writes nothing any more
_SHOWN = ("torch", "ray", "ray-trainer", "numpy", "pyarrow")
_PROBE_BYTES = 4 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what it is about.
        state: ``wrong`` will or may break a run; a ``note`` is worth knowing.
        text: what was seen.
        advice: what to do; empty if all is well.
    """

    subject: str
    state: State
    text: str
    advice: str = ""


def packages(requirements: Iterable[str], installed: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """Whether the libraries are there in versions that fit."""
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = installed(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement, "not installed"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, f"installed is {version}"))
    for requirement, text in wrong:
        yield Finding("packages", "wrong", f"{requirement.name}: {text}", f"pip install '{requirement}'")
    if not wrong:
        shown = ", ".join(f"{name} {installed(name)}" for name in _SHOWN)
        yield Finding("packages", "ok", f"Python {platform.python_version()}, {shown}")


def processors(
    count: int | None, usable: int, quota: float | None, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Whether as many CPUs may be used as there seem to be.

    Args:
        count: of the machine.
        usable: those that this process may run on.
        quota: CPUs' worth of time that its control group gets; None without a limit.
        environment: of this process.
    """
    allowed = min(float(usable), quota or float(usable))
    if count is not None and allowed < count:
        yield Finding(
            "CPUs",
            "note",
            f"the machine has {count}, of which this process may use {allowed:g}",
            f"start Ray with --num-cpus={max(1, int(allowed))}, so that it does not plan with more",
        )
    else:
        yield Finding("CPUs", "ok", f"{usable}")
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > allowed:
        yield Finding(
            "threads",
            "note",
            f"OMP_NUM_THREADS={threads} with {allowed:g} CPUs; workers take cluster.torch_threads_per_worker instead",
            "unset OMP_NUM_THREADS for what else runs here",
        )


def shared_memory(host: str, shared_bytes: int, memory_bytes: int) -> Finding:
    """Whether /dev/shm holds Ray's object store."""
    needed = int(memory_bytes * OBJECT_STORE_SHARE)
    text = f"{host}: /dev/shm has {readable_size(shared_bytes)}"
    if shared_bytes >= needed:
        return Finding("shared memory", "ok", text)
    return Finding(
        "shared memory",
        "wrong",
        f"{text}; Ray wants {readable_size(needed)} there and uses the much slower /tmp instead",
        f"docker run --shm-size={-(-needed // 2**30)}g; in Kubernetes mount an emptyDir with medium: Memory at "
        "/dev/shm; or start Ray with a smaller --object-store-memory",
    )


def temporary_space(path: str, total_bytes: int, free_bytes: int) -> Finding:
    """Whether Ray's own directory has room."""
    text = f"{path} has {readable_size(free_bytes)} of {readable_size(total_bytes)} free"
    if free_bytes >= (1 - FULLEST_DISK) * total_bytes:
        return Finding("disk", "ok", text)
    return Finding("disk", "wrong", f"{text}; Ray does not write to a disk that is fuller than 95%", f"clean up {path}")


def authentication(environment: Mapping[str, str], home: Path) -> Finding:
    """Whether this process has the token that a cluster asks for, where clusters here ask for one."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    source = "RAY_AUTH_TOKEN" if environment.get("RAY_AUTH_TOKEN") else str(path)
    has_token = source == "RAY_AUTH_TOKEN" or path.is_file()
    if mode == "token" and not has_token:
        return Finding(
            "authentication",
            "wrong",
            f"RAY_AUTH_MODE=token, but there is no token: neither RAY_AUTH_TOKEN nor the file {path}",
            "copy ~/.ray/auth_token of the head node there, or set RAY_AUTH_TOKEN to what is in it",
        )
    if not mode and has_token:
        return Finding(
            "authentication",
            "note",
            f"there is a token ({source}), so 'ray start --head' on this machine asks for one, but RAY_AUTH_MODE is "
            "not set, so this process would not show it",
            "export RAY_AUTH_MODE=token to join such a cluster; export RAY_AUTH_MODE=disabled on both sides otherwise",
        )
    return Finding("authentication", "ok", f"token, from {source}" if mode == "token" else "no token is asked for")


def storage(location: str, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether runs can be kept there: writes, reads, replaces files whole, deletes, and what its clock says.

    What is written is deleted again, as are directories that were made for it.
    """
    try:
        place = Storage.open(location).impatient()
    except ConfigError as error:
        yield Finding("storage", "wrong", str(error), "name a directory or URI with --storage-path")
        return
    made = _missing_directories(place)
    probe = place.child(f".doctor-{uuid.uuid4().hex[:8]}")
    try:
        yield from _try_storage(probe, place.uri, clock)
    except OSError as error:
        advice = "check that it exists, its permissions and the credentials" if not place.is_local else "name another"
        yield Finding("storage", "wrong", f"{place.uri} cannot be used: {error}", advice)
    finally:
        _remove(probe, made)


def clocks(host: str, offset_s: float, error_s: float) -> Finding:
    """Whether a clock goes as this machine's does."""
    text = f"{host}: {offset_s:+.2f} s from this machine (± {error_s:.2f} s)"
    if abs(offset_s) - error_s <= MAX_CLOCK_OFFSET_S:
        return Finding("clock", "ok", text)
    return Finding(
        "clock", "wrong", f"{text}; the order of events and the age of checkpoints depend on it", "run chrony or NTP"
    )


def node(facts: NodeFacts, is_seen: bool, installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """What one node of a cluster told.

    Args:
        facts: what it told.
        is_seen: whether this machine sees the file that it wrote into the storage.
        installed: versions of this machine.
    """
    if facts.problem:
        yield Finding("node", "wrong", f"{facts.host} does not answer: {facts.problem}", "look at the logs of its Ray")
        return
    other = {
        package: (version, ours)
        for package, version in facts.versions.items()
        if (ours := installed(package)) is not None and version != ours
    }
    if other:
        told = ", ".join(f"{name} {theirs or 'is missing'} (here {ours})" for name, (theirs, ours) in other.items())
        yield Finding(
            "node", "wrong", f"{facts.host}: {told}", "install the same versions everywhere: bits depend on them"
        )
    else:
        yield Finding("node", "ok", f"{facts.host}: same versions as here")
    yield clocks(facts.host, facts.clock_offset_s, facts.clock_error_s)
    yield shared_memory(facts.host, facts.shared_memory_bytes, facts.memory_bytes)
    if facts.storage_problem or not is_seen:
        problem = facts.storage_problem or "what it writes is not seen here"
        yield Finding(
            "storage",
            "wrong",
            f"{facts.host} does not share it: {problem}",
            "name a directory that all nodes have mounted, or a URI such as s3://bucket/runs",
        )
    else:
        yield Finding("storage", "ok", f"{facts.host} sees what this machine writes, and the other way round")


def cpu_quota() -> float | None:
    """CPUs' worth of time that the control group of this process gets; None without a limit."""
    for limits in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        try:
            words = Path(limits).read_text().split()
            period = words[1] if len(words) > 1 else Path(limits).with_name("cpu.cfs_period_us").read_text()
        except OSError:
            continue
        return None if words[0] in ("max", "-1") else int(words[0]) / int(period)
    return None


def _try_storage(probe: Storage, uri: str, clock: Callable[[], float]) -> Iterator[Finding]:
    started = time.monotonic()
    probe.write("whole", os.urandom(_PROBE_BYTES))
    seconds = max(time.monotonic() - started, 1e-6)
    offset_s = probe.filesystem.get_file_info(f"{probe.path}/whole").mtime_ns / 1e9 - clock()
    if probe.size("whole") != _PROBE_BYTES or "whole" not in probe.list():
        yield Finding("storage", "wrong", f"{uri}: what was written is not what is there", "use another storage")
        return
    torn = _torn_reads(probe)
    probe.delete("whole")
    if torn:
        yield Finding("storage", "wrong", f"{uri}: {torn}", "use storage that replaces files in one step")
    elif probe.exists("whole"):
        yield Finding("storage", "wrong", f"{uri}: a deleted file is still there", "use storage that is consistent")
    else:
        speed = readable_size(_PROBE_BYTES / seconds)
        yield Finding("storage", "ok", f"{uri}: written, read, replaced and deleted whole; {speed}/s")
    yield clocks(f"storage {uri}", offset_s, seconds)
    if probe.is_local:
        usage = shutil.disk_usage(probe.local_path())
        yield temporary_space(uri, usage.total, usage.free)


def _torn_reads(probe: Storage, times: int = 20) -> str:
    """Replace a file again and again while it is read: every reader must see one of them, whole."""
    contents = (b"a" * 65536, b"b" * 70000)
    probe.write("replaced", contents[0])
    ended = threading.Event()
    problems: list[str] = []

    def read() -> None:
        while not ended.is_set():
            try:
                if probe.read("replaced") not in contents:
                    problems.append("a file that is replaced can be read by halves")
            except OSError as error:
                problems.append(f"a file that is replaced cannot be read for a moment ({error})")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for number in range(times if probe.is_local else 3):
        probe.write("replaced", contents[number % 2])
    ended.set()
    reader.join()
    return problems[0] if problems else ""


def _missing_directories(place: Storage) -> list[Path]:
    if not place.is_local:
        return []
    path = place.local_path()
    return [missing for missing in (path, *path.parents) if not missing.exists()]


def _remove(probe: Storage, made: list[Path]) -> None:
    try:
        probe.delete()
        for directory in made:
            if directory.is_dir():
                directory.rmdir()
    except OSError:  # not empty any more, or as broken as the findings say
        return
