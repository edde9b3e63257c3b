"""What is moved out of a run's directory before training goes on in it."""

import logging
from functools import partial

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, LoadedCheckpoint
from ray_trainer.checkpoint.layout import checkpoint_order
from ray_trainer.journal import RUN_FILES, move_aside
from ray_trainer.metrics import saved_checkpoints

logger = logging.getLogger(__name__)


def make_room(manager: CheckpointManager, saved: LoadedCheckpoint | None, resume_from: str | None) -> None:
    """Leave in the run's directory what the run goes on from, and nothing that would be mixed up with it.

    A fresh start moves an earlier run, and a start from an older checkpoint moves the later ones, to
    ``previous_NN/``. Rank 0 acts; collective.
    """
    storage = manager.storage
    with distributed.same_error_everywhere():
        if distributed.rank() == 0:
            manager.clean_leftovers(partial(saved_checkpoints, storage))
            if saved is None and resume_from is None:
                later = [name for name in storage.list() if name in RUN_FILES or _is_of_checkpoint(name)]
            else:
                last = -1 if saved is None else saved.record.step
                later = [record.name for record in manager.records() if record.step > last]
            place = move_aside(storage, later)
            if place is not None:
                logger.warning("What an earlier run left in %s is in %s/ there now.", storage.uri, place)
            manager.forget()


def _is_of_checkpoint(name: str) -> bool:
    """Whether a directory is a checkpoint, or one that was set aside."""
    return checkpoint_order(name.partition(".")[0]) is not None
