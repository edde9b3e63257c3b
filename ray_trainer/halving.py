"""Smaller pieces of a batch at once after memory did not suffice, the same for all ranks and on every resume."""

import logging
from collections.abc import Sequence

from ray_trainer import distributed
from ray_trainer.config import TrainingConfig
from ray_trainer.journal import Journal
from ray_trainer.marks import Mark, ended_for_memory
from ray_trainer.metrics.events import read_events
from ray_trainer.metrics.jsonl import Row
from ray_trainer.shortage import is_shortage
from ray_trainer.state import Progress
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_EVENT, _DEATH = "out_of_memory", "ended_for_memory"


class Halving:
    """Lets micro-batches be processed in twice as many pieces from a step on.

    The global batch stays what it is: gradients of sums are added up, whatever the pieces. What a step draws at
    random, and what depends on the samples that are processed together, as in batch normalisation, is another
    thing in smaller pieces; so from which step on is a part of the run's state, and is told by an event before
    anything is done, so that a run that is resumed from a checkpoint before that step does the same.

    A single process tries the step again. Of several, the one that failed can't tell the others, which wait for
    its gradients: it fails, and when the workers start again all of them process smaller pieces.

    A process that the kernel, or Ray, ends for want of memory tells nothing, and may have been in the way of another
    one that needed it. What it was at its mark tells; the second such death at the same step counts as a shortage.
    """

    def __init__(self, config: TrainingConfig, progress: Progress, journal: Journal) -> None:
        self._is_on = config.on_out_of_memory == "halve" and not config.fast_dev_run
        self._batch_size = config.batch_size
        self._progress = progress
        self._journal = journal

    def recall(self, storage: Storage, left: Sequence[Mark] = ()) -> None:
        """Add what earlier attempts found out to the state, and tell what the one before died of. Collective.

        Args:
            storage: of the run.
            left: marks of the attempt before.
        """
        if not self._is_on and not left:
            return
        found: list[Row] = []
        with distributed.same_error_everywhere():
            if distributed.rank() == 0:
                for mark in ended_for_memory(left, read_events(storage)):
                    self._tell_death(mark, read_events(storage))
                found = read_events(storage)
        if not self._is_on:
            return
        told = [[event["step"], event["pieces"]] for event in found if event["event"] == _EVENT]
        known = {(step, pieces) for step, pieces in [*self._progress.pieces, *distributed.broadcast_object(told)]}
        self._progress.pieces = [list(entry) for entry in sorted(known)]

    def take(self, error: BaseException) -> bool:
        """Take note of what was raised in the step in progress; whether it may be tried again, in smaller pieces."""
        progress = self._progress
        if not self._is_on or not is_shortage(error) or progress.pieces_now >= self._batch_size:
            return False
        step, pieces = progress.step + 1, 2 * progress.pieces_now
        self._tell(step, progress.epoch, distributed.rank(), pieces)
        progress.pieces.append([step, pieces])
        return distributed.world_size() == 1

    def _tell(self, step: int, epoch: int, rank: int, pieces: int) -> None:
        size = -(-self._batch_size // pieces)
        logger.warning("Out of memory in step %d: from here on %d samples are processed at once.", step, size)
        self._journal.event_of_any_rank(_EVENT, step, epoch, rank=rank, pieces=pieces, samples_at_once=size)

    def _tell_death(self, mark: Mark, events: Sequence[Row]) -> None:
        """Keep where a process died for want of memory, and that the step needs too much if it is not the first."""
        step = mark.step + 1
        told = [event for event in events if event["event"] == _DEATH]
        if any(event["failed_attempt"] == mark.attempt for event in told):
            return  # of another rank
        pieces = max((row["pieces"] for row in events if row["event"] == _EVENT and row["step"] <= step), default=1)
        self._journal.event(_DEATH, step, mark.epoch, rank=mark.rank, failed_attempt=mark.attempt, pieces=pieces)
        logger.warning(
            "Rank %d was ended in step %d because memory of its machine ran out. If that comes again, lower batch_size "
            "(%d), which on_out_of_memory 'halve' does after the second time, or let less run on the machine.",
            *(mark.rank, step, self._batch_size),
        )
        is_second = any((event["step"], event["pieces"]) == (step, pieces) for event in told)
        if self._is_on and is_second and pieces < self._batch_size:
            self._tell(step, mark.epoch, mark.rank, 2 * pieces)
