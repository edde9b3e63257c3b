"""What a run leaves beside its checkpoints: events, rows of metrics, its configuration and surroundings."""

import json
import os
import platform
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ray_trainer import distributed
from ray_trainer.checkpoint import LoadedCheckpoint
from ray_trainer.config import TrainingConfig
from ray_trainer.config.documents import dump_yaml
from ray_trainer.metrics.events import EventLog, next_attempt, read_events
from ray_trainer.metrics.jsonl import Row, encode_row
from ray_trainer.metrics.tensorboard import TensorBoardWriter
from ray_trainer.metrics.writers import JsonlWriter, MetricsWriter, Writers
from ray_trainer.runtime import Runtime, Stop
from ray_trainer.state import Progress
from ray_trainer.storage import Storage

#: What belongs to a run in its directory, beside its checkpoints.
RUN_FILES = ("run.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "tensorboard", "stacks", "report.html")
_STARTED = "workers_started"
_ENDINGS = ("hang", "failure", "controller_lost", "preemption")  # of an attempt, seen from outside of it
_PACKAGES = ("ray-trainer", "torch", "ray", "numpy", "pyarrow", "safetensors", "tensorboardX")


class Journal:
    """Written by rank 0; on the others, and in a ``fast_dev_run``, it takes everything and keeps nothing.

    Attributes:
        attempt: which start of the run this is, from 1; 0 where nothing is written.
    """

    def __init__(self, runtime: Runtime, config: TrainingConfig) -> None:
        self._runtime = runtime
        self._config = config
        self._events: EventLog | None = None
        self._writers = Writers()
        self._recent = RecentRows(100 if runtime.storage.is_local else 10_000)
        self.attempt = 0

    def open(self, saved: LoadedCheckpoint | None) -> None:
        """Begin the files of this attempt; rows beyond the step that training resumes from are dropped. Collective.

        Raises:
            OSError: storage cannot be read or written.
        """
        carried = saved.carried if saved else None
        pids = distributed.gather_objects(os.getpid())
        if distributed.rank() == 0 and not self._config.fast_dev_run:
            earlier = read_events(self._runtime.storage)
            self._begin_files(saved, rewind_to=_last_step_before(saved))
            self._tell_beginning(saved, pids, earlier)
        self.attempt = distributed.broadcast_object(self.attempt)
        for row in carried.rows if carried else ():
            self._add(row)

    def _begin_files(self, saved: LoadedCheckpoint | None, rewind_to: int) -> None:
        storage = self._runtime.storage
        self.attempt = next_attempt(storage)
        self._events = EventLog(storage, self.attempt)
        writers: list[MetricsWriter] = [JsonlWriter(storage, self.attempt)]
        if self._config.tensorboard:
            writers.append(TensorBoardWriter(storage, self.attempt))
        self._writers = Writers(writers)
        self._writers.rewind(rewind_to)
        described = {"training": self._config.to_dict(), **self._runtime.describe()}
        storage.write("run.yaml", dump_yaml(described).encode())
        storage.write("environment.json", json.dumps(environment(), indent=2).encode())

    def _tell_beginning(self, saved: LoadedCheckpoint | None, pids: list[int], earlier: Sequence[Row]) -> None:
        if self.attempt == 1:
            self.event("run_started", step=0, epoch=0)
        step, epoch = (saved.record.step, saved.record.epoch) if saved else (0, 0)
        self.event(_STARTED, step, epoch, num_workers=len(pids), pids=pids)
        if saved is not None:
            self._tell_origin(saved, earlier)
        before = _num_workers_before(saved, earlier)
        if before not in (None, len(pids)):
            self.event("resized", step, epoch, **{"from": before, "to": len(pids)})

    def _tell_origin(self, saved: LoadedCheckpoint, earlier: Sequence[Row]) -> None:
        step, epoch = saved.record.step, saved.record.epoch
        for name, reason in saved.rejected:
            self.event("checkpoint_rejected", step, epoch, checkpoint=name, reason=reason)
        origin = {"from": saved.record.name, "tier": str(saved.tier.name).lower()}
        if saved.carried is not None:
            self.event("resumed", step, epoch, **origin)
            self.event("rejoined", step, epoch, **saved.carried.story)
        else:
            self.event("resumed", step, epoch, **origin, **_phases(saved, earlier))

    def conclude(self, progress: Progress, interruption: Stop) -> None:
        """Tell how the run, or this attempt, ended."""
        if interruption is Stop.NONE:
            reason = progress.stop_reason or "the configured length is reached"
            self.event("run_finished", progress.step, progress.last_epoch, reason=reason, training_s=progress.elapsed_s)
        else:
            self.event("interrupted", progress.step, progress.last_epoch, by=interruption.name)

    def event(self, event: str, step: int | None = None, epoch: int | None = None, **details: Any) -> None:
        """Record what happened, and tell whoever watches."""
        if self._events is not None:
            self._runtime.announce(event, self._events.record(event, step, epoch, **details))

    def event_of_any_rank(self, event: str, step: int, epoch: int, **details: Any) -> None:
        """As `event`, for what one rank alone knows; not in a ``fast_dev_run``."""
        if self._events is not None:
            self.event(event, step, epoch, **details)
        elif self.attempt:
            log = EventLog(self._runtime.storage, self.attempt, writer=f"rank{distributed.rank()}")
            log.record(event, step, epoch, **details)

    def event_once(self, event: str, step: int | None = None, epoch: int | None = None, **details: Any) -> None:
        """As `event`, unless an earlier attempt recorded the very same."""
        if self._events is None:
            return
        row = json.loads(encode_row({"step": step, "epoch": epoch, **details}))
        for earlier in read_events(self._runtime.storage):
            if earlier["event"] == event and all(earlier.get(name) == value for name, value in row.items()):
                return
        self.event(event, step, epoch, **details)

    def metrics(self, split: str, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Add a row of ``train`` or ``val``; (split, step) comes once."""
        self._add({"step": step, "epoch": epoch, "split": split, **values})

    def recent_rows(self) -> tuple[dict[str, Any], ...]:
        """The rows that may not be on storage if rank 0 is lost, on any rank; all of a step or none."""
        return self._recent.rows()

    def _add(self, row: dict[str, Any]) -> None:
        if self._runtime.survivor is not None:
            self._recent.add(row)
        self._writers.write(row)

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps, which come again.

        Raises:
            OSError: they could not be dropped and would stand twice.
        """
        self._recent.forget_after(step)
        self._writers.rewind(step)

    def flush(self) -> None:
        """Bring rows to storage. On all ranks."""
        self._recent.forget_but_newest_step()
        self._writers.flush()

    def close(self) -> None:
        """Bring everything to storage."""
        self._writers.close()


class RecentRows:
    """The rows of the last steps: all of a step or none.

    Args:
        most: how many at most, give or take those of one step.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: deque[dict[str, Any]] = deque()

    def add(self, row: dict[str, Any]) -> None:
        """Add one, of the newest step."""
        self._rows.append(row)
        if len(self._rows) > self._most:
            self._forget_steps_before(min(int(self._rows[0]["step"]) + 1, row["step"]))

    def forget_but_newest_step(self) -> None:
        """Forget those that are of no use any more; others of the newest step may follow."""
        if self._rows:
            self._forget_steps_before(int(self._rows[-1]["step"]))

    def forget_after(self, step: int) -> None:
        """Forget those of later steps: the run has gone back."""
        while self._rows and self._rows[-1]["step"] > step:
            self._rows.pop()

    def rows(self) -> tuple[dict[str, Any], ...]:
        """All there are, old to new."""
        return tuple(self._rows)

    def _forget_steps_before(self, step: int) -> None:
        while self._rows and self._rows[0]["step"] < step:
            self._rows.popleft()


def _num_workers_before(saved: LoadedCheckpoint | None, earlier: Sequence[Row]) -> int | None:
    """Of the attempt before this one, or else of what this one goes on from; None if this is the beginning."""
    started = [int(row["num_workers"]) for row in earlier if row["event"] == _STARTED and "num_workers" in row]
    if started:
        return started[-1]
    return None if saved is None else saved.manifest.world_size


def _phases(saved: LoadedCheckpoint, earlier: Sequence[Row]) -> dict[str, float]:
    """When the end of the last attempt was noticed, how long it took until workers were there, and to read the state.

    Only the last where nobody noticed, as when the driver was killed or somebody had the run stopped.
    """
    started = max((place for place, row in enumerate(earlier) if row["event"] == _STARTED), default=len(earlier))
    noticed_at = next((row["time"] for row in earlier[started:] if row["event"] in _ENDINGS), None)
    phases = {"state_s": saved.state_s}
    if noticed_at is not None:
        phases = {"noticed_at": noticed_at, "waited_s": max(0.0, saved.asked_at - noticed_at), **phases}
    return phases


def _last_step_before(saved: LoadedCheckpoint | None) -> int:
    """The last step whose rows stay as they are: later ones are dropped, or written again."""
    if saved is None:
        return 0
    rows = saved.carried.rows if saved.carried is not None else ()
    return min([saved.record.step, *(int(row["step"]) - 1 for row in rows[:1])])


def environment() -> dict[str, Any]:
    """Versions, host, threads, git revision: what a run's bits and speed depend on."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": distributed.world_size(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the directory the run was started in; None where that is no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def move_aside(storage: Storage, names: list[str]) -> str | None:
    """Move what an earlier run left in its directory to ``previous_NN/`` there; returns that name.

    Nothing is deleted and nothing of it is mixed with the new run.
    """
    if not names:
        return None
    taken = set(storage.list())
    number = 1
    while f"previous_{number:02d}" in taken:
        number += 1
    for name in names:
        storage.move(name, f"previous_{number:02d}/{name}")
    return f"previous_{number:02d}"
