"""Batches at which training fails twice: which samples they hold, and leaving them out from then on."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ray_trainer import distributed
from ray_trainer.config import TrainingConfig
from ray_trainer.data import BatchSource
from ray_trainer.data.crashing import CrashingSamples
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.errors import DataError
from ray_trainer.journal import Journal
from ray_trainer.marks import BACKWARD, BEREFT, FORWARD, NOWHERE, Mark, Marks, ended_for_memory, to_blame
from ray_trainer.metrics.events import read_events
from ray_trainer.shortage import is_shortage
from ray_trainer.state import Progress
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_FAILED, _LEFT_OUT = "batch_failed", "batch_quarantined"


class Crashes:
    """Remembers at which batches training failed, and quarantines those that made it fail twice.

    A batch fails when its forward or backward pass raises, or when the process dies in it, which its mark tells,
    unless it was for want of memory. The first time nothing is done: the run is started
    again, by Ray or by whoever gives the command. At the next start after a second failure at the same step, all
    ranks leave the samples of that micro-batch out, at this step and from there on; the order of all others is
    what it was. So it is on every later start. They count towards ``max_bad_ratio``.

    Args:
        config: does nothing of this unless ``on_bad_data`` is "quarantine".
        progress: of the run.
        source: of the training; one without random access can't tell its samples, and is left alone.
        journal: keeps what failed and what is left out.
        marks: of this process.
    """

    def __init__(
        self, config: TrainingConfig, progress: Progress, source: BatchSource, journal: Journal, marks: Marks
    ) -> None:
        is_wanted = config.on_bad_data == "quarantine" and not config.fast_dev_run
        self._source = source if is_wanted and isinstance(source, OrderedSource) else None
        self._max_ratio = config.max_bad_ratio
        self._progress = progress
        self._journal = journal
        self._marks = marks
        self._place = (0, NOWHERE)

    def recall(self, storage: Storage, left: Sequence[Mark]) -> None:
        """Leave out what earlier attempts failed at twice. Collective.

        Args:
            storage: of the run.
            left: marks of the attempt before.

        Raises:
            DataError: on all ranks; that is more than ``max_bad_ratio`` allows.
        """
        if self._source is None:
            return
        found: list[CrashingSamples] = []
        with distributed.same_error_everywhere():
            if distributed.rank() == 0:
                self._tell_deaths(left, read_events(storage))
                found = self._failed_twice(read_events(storage))
        self._source.leave_out(distributed.broadcast_object(found))

    def enter(self, micro_batch: int) -> None:
        """The forward pass of a micro-batch begins."""
        self._mark(micro_batch, FORWARD)

    def enter_backward(self, micro_batch: int) -> None:
        """Its backward pass begins, in which ranks wait for each other."""
        self._mark(micro_batch, BACKWARD)

    def leave(self) -> None:
        """All passes of the step are done."""
        self._mark(0, NOWHERE)

    def failed(self, error: BaseException) -> None:
        """Keep that the pass in progress raised, unless another rank or a shortage of memory is to blame."""
        micro_batch, phase = self._place
        is_consequence = distributed.blames_another(str(error))
        self._mark(0, BEREFT if is_consequence else NOWHERE)
        if self._source is None or phase == NOWHERE or is_consequence or is_shortage(error):
            return
        if isinstance(error, Exception):
            self._tell(self._mark_of(micro_batch, phase), f"{type(error).__name__}: {error}")

    def _mark(self, micro_batch: int, phase: int) -> None:
        self._place = (micro_batch, phase)
        if self._marks.are_kept:
            self._marks.put(self._mark_of(micro_batch, phase))

    def _mark_of(self, micro_batch: int, phase: int) -> Mark:
        progress, ranks = self._progress, (distributed.world_size(), distributed.rank())
        attempt = self._journal.attempt
        return Mark(attempt, progress.epoch, progress.step_in_epoch, progress.step, *ranks, micro_batch, phase)

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

    def _tell_deaths(self, left: Sequence[Mark], events: Sequence[Mapping[str, Any]]) -> None:
        """Keep where processes of the attempt before died."""
        told = {event["failed_attempt"] for event in events if event["event"] == _FAILED}
        dead = to_blame([mark for mark in left if mark.attempt not in told])
        for_memory = ended_for_memory(dead, events)
        for mark in dead:
            if mark not in for_memory:
                self._tell(mark, "the process died")

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
