"""Batches at which training fails twice: which samples they hold, and leaving them out from then on."""

import logging
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ray_trainer import distributed
from ray_trainer.config import TrainingConfig
from ray_trainer.data import BatchSource
from ray_trainer.data.crashing import CrashingSamples
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.errors import DataError
from ray_trainer.journal import Journal
from ray_trainer.metrics.events import read_events
from ray_trainer.shortage import is_shortage
from ray_trainer.state import Progress
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_FAILED, _LEFT_OUT = "batch_failed", "batch_quarantined"
_FOLDER = ".steps"
NOWHERE, FORWARD, BACKWARD = range(3)


class Mark(NamedTuple):
    """Where a process is: eight bytes each in a file that outlives it.

    Attributes:
        attempt: start of the run.
        epoch, step_in_epoch, step: completed ones.
        world_size, rank: of the process.
        micro_batch: which of the rank's, from 0.
        phase: nowhere in particular, in the forward or in the backward pass.
    """

    attempt: int
    epoch: int
    step_in_epoch: int
    step: int
    world_size: int
    rank: int
    micro_batch: int
    phase: int


_FORM = struct.Struct("<8q")


class Crashes:
    """Remembers at which batches training failed, and quarantines those that made it fail twice.

    A batch fails when its forward or backward pass raises, or when the process dies in it, which a mark in memory
    that outlives the process tells (where storage is local). The first time nothing is done: the run is started
    again, by Ray or by whoever gives the command. At the next start after a second failure at the same step, all
    ranks leave the samples of that micro-batch out, at this step and from there on; the order of all others is
    what it was. So it is on every later start. They count towards ``max_bad_ratio``.

    Args:
        config: does nothing of this unless ``on_bad_data`` is "quarantine".
        progress: of the run.
        source: of the training; one without random access can't tell its samples, and is left alone.
        journal: keeps what failed and what is left out.
    """

    def __init__(self, config: TrainingConfig, progress: Progress, source: BatchSource, journal: Journal) -> None:
        is_wanted = config.on_bad_data == "quarantine" and not config.fast_dev_run
        self._source = source if is_wanted and isinstance(source, OrderedSource) else None
        self._max_ratio = config.max_bad_ratio
        self._progress = progress
        self._journal = journal
        self._attempt = 0
        self._place = (0, NOWHERE)
        self._file: mmap.mmap | None = None

    def recall(self, storage: Storage) -> None:
        """Leave out what earlier attempts failed at twice. Collective.

        Raises:
            DataError: on all ranks; that is more than ``max_bad_ratio`` allows.
        """
        if self._source is None:
            return
        found: list[CrashingSamples] = []
        with distributed.same_error_everywhere():
            if distributed.rank() == 0:
                self._tell_deaths(storage)
                found = self._failed_twice(read_events(storage))
        self._source.leave_out(distributed.broadcast_object(found))
        self._attempt = self._journal.attempt
        if storage.is_local:
            self._file = _open(storage.local_path(_FOLDER), distributed.rank())

    def enter(self, micro_batch: int) -> None:
        """The forward pass of a micro-batch begins."""
        if self._source is not None:
            self._mark(micro_batch, FORWARD)

    def enter_backward(self, micro_batch: int) -> None:
        """Its backward pass begins, in which ranks wait for each other."""
        if self._source is not None:
            self._mark(micro_batch, BACKWARD)

    def leave(self) -> None:
        """All passes of the step are done."""
        if self._source is not None:
            self._mark(0, NOWHERE)

    def failed(self, error: BaseException) -> None:
        """Keep that the pass in progress raised, unless another rank or a shortage of memory is to blame."""
        micro_batch, phase = self._place
        self.leave()
        is_consequence = distributed.blames_another(str(error))
        if self._source is None or phase == NOWHERE or is_consequence or is_shortage(error):
            return
        if isinstance(error, Exception):
            self._tell(self._mark_of(micro_batch, phase), f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """The run ends: nobody died."""
        self.leave()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _mark(self, micro_batch: int, phase: int) -> None:
        self._place = (micro_batch, phase)
        if self._file is not None:
            _FORM.pack_into(self._file, 0, *self._mark_of(micro_batch, phase))

    def _mark_of(self, micro_batch: int, phase: int) -> Mark:
        progress, ranks = self._progress, (distributed.world_size(), distributed.rank())
        return Mark(self._attempt, progress.epoch, progress.step_in_epoch, progress.step, *ranks, micro_batch, phase)

    def _tell(self, mark: Mark, why: str) -> None:
        assert self._source is not None  # else there are no marks
        samples = self._source.samples_at(mark.epoch, mark.step_in_epoch, mark.rank, mark.world_size)
        self._journal.event_of_any_rank(
            _FAILED,
            mark.step + 1,
            mark.epoch,
            step_in_epoch=mark.step_in_epoch,
            rank=mark.rank,
            failed_attempt=mark.attempt,
            error=why,
            samples=samples[min(mark.micro_batch, len(samples) - 1)].tolist(),
        )

    def _tell_deaths(self, storage: Storage) -> None:
        """Keep where processes of the attempt before died, and clear their marks."""
        if not storage.is_local:
            return
        files = _files(storage.local_path(_FOLDER)) if self._journal.attempt > 1 else []
        marks = [Mark._make(_FORM.unpack(path.read_bytes()[: _FORM.size])) for path in files]
        told = {event["failed_attempt"] for event in read_events(storage) if event["event"] == _FAILED}
        for mark in to_blame([mark for mark in marks if mark.attempt not in told]):
            self._tell(mark, "the process died")
        storage.delete(_FOLDER)

    def _failed_twice(self, events: Iterable[Mapping[str, Any]]) -> list[CrashingSamples]:
        assert self._source is not None  # asked only then
        attempts: Counter[tuple[int, int, int, int]] = Counter()
        for event in [event for event in events if event["event"] == _FAILED]:
            place = (event["epoch"], event["step_in_epoch"], event["step"])
            attempts.update((*place, row) for row in set(event["samples"]))
        twice: dict[tuple[int, int, int], list[int]] = {}
        for (epoch, step_in_epoch, step, row), times in sorted(attempts.items()):
            if times >= 2:
                twice.setdefault((epoch, step_in_epoch, step), []).append(row)
        self._refuse_too_many({row for rows in twice.values() for row in rows})
        for (epoch, step_in_epoch, step), rows in twice.items():
            logger.warning("%d samples are left out from step %d on: training failed there twice.", len(rows), step)
            self._journal.event_once(_LEFT_OUT, step, epoch, step_in_epoch=step_in_epoch, samples=rows)
        return [
            CrashingSamples(epoch, step_in_epoch, np.array(rows, dtype=np.int64))
            for (epoch, step_in_epoch, _), rows in twice.items()
        ]

    def _refuse_too_many(self, rows: set[int]) -> None:
        assert self._source is not None  # as above
        total = self._source.num_samples
        if len(rows) > self._max_ratio * total:
            listed = ", ".join(map(str, sorted(rows)[:20]))
            raise DataError(
                f"Training failed twice at each of {len(rows)} of {total} samples ({listed} ...), more than "
                f"max_bad_ratio ({self._max_ratio:g}) allows to leave out. What was raised is in events.jsonl, "
                "as batch_failed. Mend it, or raise max_bad_ratio."
            )


def to_blame(marks: Sequence[Mark]) -> list[Mark]:
    """Of the processes of an attempt, those that may have died of their batch.

    Those in the backward pass wait for each other. So if another one was elsewhere, it is that one that has died;
    if that was between two passes, of something else than a batch.
    """
    forward = [mark for mark in marks if mark.phase == FORWARD]
    backward = [mark for mark in marks if mark.phase == BACKWARD]
    are_all_there = bool(backward) and len(backward) == backward[0].world_size
    return forward or (backward if are_all_there else [])


def _open(folder: Path, rank: int) -> mmap.mmap:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}"
    path.write_bytes(bytes(_FORM.size))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _FORM.size)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
