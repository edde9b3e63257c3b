"""Smaller pieces of a batch at once after memory did not suffice, the same for all ranks and on every resume."""

import logging

from ray_trainer import distributed
from ray_trainer.config import TrainingConfig
from ray_trainer.journal import Journal
from ray_trainer.metrics.events import read_events
from ray_trainer.shortage import is_shortage
from ray_trainer.state import Progress
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_EVENT = "out_of_memory"


class Halving:
    """Lets micro-batches be processed in twice as many pieces from a step on.

    The global batch stays what it is: gradients of sums are added up, whatever the pieces. What a step draws at
    random, and what depends on the samples that are processed together, as in batch normalisation, is another
    thing in smaller pieces; so from which step on is a part of the run's state, and is told by an event before
    anything is done, so that a run that is resumed from a checkpoint before that step does the same.

    A single process tries the step again. Of several, the one that failed can't tell the others, which wait for
    its gradients: it fails, and when the workers start again all of them process smaller pieces.
    """

    def __init__(self, config: TrainingConfig, progress: Progress, journal: Journal) -> None:
        self._is_on = config.on_out_of_memory == "halve" and not config.fast_dev_run
        self._batch_size = config.batch_size
        self._progress = progress
        self._journal = journal

    def recall(self, storage: Storage) -> None:
        """Add what earlier attempts found out to the state. Collective."""
        if not self._is_on:
            return
        with distributed.same_error_everywhere():
            found = read_events(storage) if distributed.rank() == 0 else []
        told = [[event["step"], event["pieces"]] for event in found if event["event"] == _EVENT]
        known = {(step, pieces) for step, pieces in [*self._progress.pieces, *distributed.broadcast_object(told)]}
        self._progress.pieces = [list(entry) for entry in sorted(known)]

    def take(self, error: BaseException) -> bool:
        """Take note of what was raised in the step in progress; whether it may be tried again, in smaller pieces."""
        progress = self._progress
        if not self._is_on or not is_shortage(error) or progress.pieces_now >= self._batch_size:
            return False
        step, pieces = progress.step + 1, 2 * progress.pieces_now
        size = -(-self._batch_size // pieces)
        logger.warning("Out of memory in step %d: from here on %d samples are processed at once.", step, size)
        self._journal.event_of_any_rank(
            _EVENT, step, progress.epoch, rank=distributed.rank(), pieces=pieces, samples_at_once=size
        )
        progress.pieces.append([step, pieces])
        return distributed.world_size() == 1
