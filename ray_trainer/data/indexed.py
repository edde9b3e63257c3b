"""The one thing the exact order asks of a dataset: whole batches by index."""

from typing import Protocol, cast, runtime_checkable

from ray_trainer.data.batch import Batch
from ray_trainer.data.order import Indices


@runtime_checkable
class IndexedDataset(Protocol):
    """A dataset that reads whole batches by index.

    It may also have ``announce(indices)``, called some steps before they are fetched; ``block_sizes``, to be
    shuffled block by block; ``column(key)``, all values of a column in pieces, where that is cheap;
    ``describe()``, a `DataDescription`, to say what differs where the fingerprint does; ``bad_rows(policy)``, a list
    of `Finding`, where they are known before training; ``left_out``, what it was freed from already; and
    ``origin(indices)``, their places in the data that the user passed, where they are others.

    Attributes:
        reads_in_processes: whether loader processes may read it, and gain by it. False for what is in memory.
    """

    reads_in_processes: bool

    def __len__(self) -> int: ...

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """The samples at the indices, in that order; a function of its arguments alone.

        Args:
            indices: at least one; may repeat.
            epoch: random augmentation differs between epochs.

        Raises:
            DataError: a sample cannot be read; names its index.
        """
        ...

    def fingerprint(self) -> str:
        """Equal for equal data in every process, different (very likely) for other data."""
        ...


def origin_of(dataset: IndexedDataset, indices: Indices) -> Indices:
    """Where samples of a dataset are in the data that the user passed."""
    origin = getattr(dataset, "origin", None)
    return indices if origin is None else cast(Indices, origin(indices))
