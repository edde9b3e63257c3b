"""What checkpoints a run has. The manifests on storage are the truth; nothing here changes a file."""

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ray_trainer import distributed
from ray_trainer.checkpoint.layout import checkpoint_order, read_manifest
from ray_trainer.checkpoint.lineage import Lineage
from ray_trainer.checkpoint.manifest import MANIFEST, Manifest
from ray_trainer.checkpoint.verifying import content_problem, size_problems
from ray_trainer.errors import CheckpointCorruptError, CheckpointNotFoundError, NewerFormatError
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint in a list.

    Attributes:
        uri: what `load_weights` and `resume_from` take.
        size_bytes: of all its files.
        seconds: how long the save took.
        monitor_value: of `monitor`, as it was configured at the save; None if it is missing or not finite.
        time: of the save, UNIX seconds.
    """

    name: str
    uri: str
    step: int
    epoch: int
    size_bytes: int
    seconds: float
    metrics: dict[str, float]
    monitor: str
    mode: str
    monitor_value: float | None
    time: float
    attempt: int

    @classmethod
    def of(cls, name: str, uri: str, manifest: Manifest) -> "CheckpointRecord":
        """The record of the checkpoint that a manifest describes."""
        return cls(
            name=name,
            uri=uri,
            step=manifest.step,
            epoch=manifest.epoch,
            size_bytes=manifest.size_bytes,
            seconds=manifest.seconds,
            metrics=manifest.metrics,
            monitor=manifest.monitor,
            mode=manifest.mode,
            monitor_value=manifest.monitor_value,
            time=manifest.time,
            attempt=manifest.attempt,
        )


class Catalog:
    """The checkpoints of a run that one process commits to: read from storage once, then kept up to date."""

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._records: list[CheckpointRecord] | None = None
        self._rejected: set[str] = set()

    def records(self) -> list[CheckpointRecord]:
        """The checkpoints, old to new.

        Raises:
            OSError: storage cannot be read.
        """
        if self._records is None:
            found = list_checkpoints(self._run)
            self._records = [record for record in found if record.name not in self._rejected]
        return list(self._records)

    def readable_records(self) -> list[CheckpointRecord]:
        """As `records`; none where storage cannot be read, which is told."""
        try:
            return self.records()
        except OSError as error:
            logger.warning("Old checkpoints in %s could not be listed, so none was deleted: %s", self._run.uri, error)
            return []

    def forget(self, rejected: Iterable[str] = ()) -> None:
        """Read storage again when it is next asked, and leave out those that were found broken."""
        self._rejected.update(rejected)
        self._records = None

    def add(self, committed: CheckpointRecord, deleted: Collection[str]) -> None:
        """Take note of what was committed and what was deleted for it."""
        self._rejected.discard(committed.name)
        if self._records is None and distributed.rank() > 0:
            return  # read from storage if it is ever asked for
        others = [record for record in self.readable_records() if record.name not in (committed.name, *deleted)]
        self._records = sorted([*others, committed], key=lambda record: checkpoint_order(record.name) or ())


def open_storage(location: Storage | str | os.PathLike[str]) -> Storage:
    """The directory that a user named, or one that is open already."""
    return location if isinstance(location, Storage) else Storage.open(location)


def resolve(run: Storage, text: str) -> Storage:
    """The directory that a user means: a name in the run, a path or a URI."""
    if checkpoint_order(text) is not None and run.child(text).exists():
        return run.child(text)
    place = text if not run.is_local and text.startswith((run.uri, run.path)) else Storage.open(text).uri
    for own in (run.uri, run.path):
        if place.rstrip("/") == own:
            return run
        if place.startswith(f"{own}/"):
            return run.child(place.removeprefix(f"{own}/").rstrip("/"))
    return Storage.open(text)


def is_checkpoint(place: Storage) -> bool:
    """Whether a directory is a checkpoint, or the rest of one, and not a run."""
    return checkpoint_order(place.path.rpartition("/")[2]) is not None or place.exists(MANIFEST)


def checkpoint_names(run: Storage) -> list[str]:
    """The names of all checkpoint directories, finished or not, old to new."""
    named = [(order, name) for name in run.list() if (order := checkpoint_order(name))]
    return [name for _, name in sorted(named)]


def newest_step(run: Storage) -> int:
    """Of the checkpoints that were finished, whole or not by now; -1 for none. Opens no file."""
    for name in reversed(checkpoint_names(run)):
        order = checkpoint_order(name)
        if order and run.child(name).exists(MANIFEST):
            return order.step
    return -1


def list_checkpoints(location: Storage | str | os.PathLike[str]) -> list[CheckpointRecord]:
    """The checkpoints of a run, old to new: good manifest, all files there, right sizes.

    Checksums are not computed; `verify` does.
    """
    run = open_storage(location)
    lineage = Lineage.of(run)
    records = [_record(run, name, lineage) for name in checkpoint_names(run)]
    return [record for record in records if record]


def verify(location: Storage | str | os.PathLike[str], name: str) -> list[str]:
    """Read every file of a checkpoint and say what is wrong with it; nothing if it is whole.

    Args:
        location: the run.
        name: of the checkpoint in it.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        NewerFormatError: a later version wrote it.
    """
    checkpoint = open_storage(location).child(name)
    if not checkpoint.exists():
        raise CheckpointNotFoundError(f"Checkpoint not found: {checkpoint.uri}")
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the save was never finished"]
    except CheckpointCorruptError as error:
        return [str(error)]
    problems = (content_problem(checkpoint, file, entry) for file, entry in manifest.files.items())
    return [problem for problem in problems if problem]


def _record(run: Storage, name: str, lineage: Lineage) -> CheckpointRecord | None:
    checkpoint = run.child(name)
    try:
        manifest = read_manifest(checkpoint)
    except (FileNotFoundError, CheckpointCorruptError):
        return None
    except NewerFormatError as error:
        logger.warning("%s is left alone: %s", checkpoint.uri, error)
        return None
    if lineage.is_stray(name, manifest):
        return None
    return None if size_problems(checkpoint, manifest) else CheckpointRecord.of(name, checkpoint.uri, manifest)
