"""From whatever a user passes as data to the steps of an epoch."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from ray_trainer.data.batch import Batch, BatchPlan, StepBatch, to_device
from ray_trainer.data.indexed import IndexedDataset
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.data.quarantine import KEEP, BadDataPolicy, checked
from ray_trainer.data.readers import as_indexed, refuse_unsplit
from ray_trainer.data.samples import Collate
from ray_trainer.data.streams import StreamSource, as_loader
from ray_trainer.errors import DataError

__all__ = [
    "Batch",
    "BatchPlan",
    "BatchSource",
    "IndexedDataset",
    "OrderedSource",
    "StepBatch",
    "StreamSource",
    "build_source",
    "to_device",
]


@runtime_checkable
class BatchSource(Protocol):
    """One rank's view of the data, step by step."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data in every process; compared when a run goes on. May read a few samples."""
        ...

    @property
    def num_samples(self) -> int | None:
        """Samples of one epoch over all ranks; None where nobody knows."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a resumed run sees exactly what an unbroken one sees; if not, a warning told why."""
        ...

    @property
    def is_repeatable(self) -> bool:
        """Whether reading a batch ahead of the training leaves no trace."""
        ...

    def steps_per_epoch(self) -> int | None:
        """Number of steps; None where nobody knows before the end."""
        ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]:
        """The steps of an epoch from global batch ``start`` on; ends at the same step on all ranks."""
        ...


def build_source(
    data: Any, plan: BatchPlan, collate_fn: Collate | None = None, bad_data: BadDataPolicy = KEEP
) -> BatchSource:
    """The source for a dataset, loader or iterable; a source is returned as it is.

    Args:
        data: anything `as_indexed` takes, a `DataLoader` (used as it is), or an iterable of samples.
        plan: who takes which samples.
        collate_fn: makes a batch of a list of samples; not for a `DataLoader`, which has its own.
        bad_data: what is done with bad rows of data that is in memory or in columns.

    Raises:
        DataError: the data is empty, or cannot be read this way.
    """
    if isinstance(data, BatchSource):
        return data
    refuse_unsplit(data)
    if isinstance(data, DataLoader):
        return StreamSource(data, plan)
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        return StreamSource(as_loader(data, plan, collate_fn), plan)
    if data is None:
        raise DataError("There is no training data: None was passed.")
    return OrderedSource(checked(as_indexed(data, plan.seed, collate_fn), bad_data), plan)
