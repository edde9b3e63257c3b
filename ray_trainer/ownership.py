"""The run's directory belongs to this run alone while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, LoadedCheckpoint
from ray_trainer.checkpoint.catalog import checkpoint_names
from ray_trainer.checkpoint.layout import checkpoint_order
from ray_trainer.checkpoint.lineage import inherit
from ray_trainer.runtime import Runtime


@contextmanager
def owned(runtime: Runtime, manager: CheckpointManager, *, is_needed: bool = True) -> Iterator[None]:
    """Own the directory inside: what is written there is fenced. Collective.

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
            yield
        finally:
            manager.storage = unfenced


def take_over_checkpoints(manager: CheckpointManager, saved: LoadedCheckpoint | None) -> None:
    """Note which checkpoints are part of the run: those up to the one that it goes on from. Collective.

    What an earlier owner finishes from now on does not count. A start that is refused must not come to this: files
    that are brought back after it are still those of the run.
    """
    last = -1 if saved is None else saved.record.step
    with distributed.same_error_everywhere():
        if distributed.rank() == 0:
            found = ((name, checkpoint_order(name)) for name in checkpoint_names(manager.storage))
            inherit(manager.storage, [name for name, order in found if order is not None and order.step <= last])
