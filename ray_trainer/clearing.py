"""What is moved out of a run's directory before training goes on in it."""

import logging

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, LoadedCheckpoint
from ray_trainer.journal import RUN_FILES, move_aside

logger = logging.getLogger(__name__)


def make_room(manager: CheckpointManager, saved: LoadedCheckpoint | None, resume_from: str | None) -> None:
    """Leave in the run's directory what the run goes on from, and nothing that would be mixed up with it.

    A fresh start moves an earlier run, and a start from an older checkpoint moves the later ones, to
    ``previous_NN/``. Rank 0 acts; collective.
    """
    storage = manager.storage
    with distributed.same_error_everywhere():
        if distributed.rank() == 0:
            manager.clean_leftovers()
            later = [record.name for record in manager.records() if saved is None or record.step > saved.record.step]
            if saved is None:
                later += [name for name in RUN_FILES if storage.exists(name)] if resume_from is None else []
            place = move_aside(storage, later)
            if place is not None:
                logger.warning("What an earlier run left in %s is in %s/ there now.", storage.uri, place)
            manager.forget()
