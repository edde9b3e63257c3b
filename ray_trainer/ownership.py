"""The run's directory belongs to this run alone while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager
from ray_trainer.checkpoint.catalog import checkpoint_names
from ray_trainer.checkpoint.lineage import inherit
from ray_trainer.runtime import Runtime


@contextmanager
def owned(runtime: Runtime, manager: CheckpointManager, *, is_needed: bool = True) -> Iterator[None]:
    """Own the directory inside: what is written there is fenced, and what was there is taken over. Collective.

    Args:
        runtime: says how the directory is claimed.
        manager: of its checkpoints.
        is_needed: False where nothing is going to be written.

    Raises:
        LeaseHeldError: on all ranks; another process is at work on the run. Nothing was written.
    """
    if not is_needed:
        yield
        return
    unfenced = manager.storage
    with runtime.hold():
        manager.storage = runtime.storage
        try:
            with distributed.same_error_everywhere():
                if distributed.rank() == 0:
                    inherit(manager.storage, checkpoint_names(manager.storage))
            yield
        finally:
            manager.storage = unfenced
