"""Steps of a dataset with random access: exact from any position, with any number of ranks."""

from collections import deque
from collections.abc import Iterator
from functools import cached_property
from itertools import tee
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from ray_trainer.data.batch import Batch, BatchPlan, StepBatch
from ray_trainer.data.indexed import IndexedDataset
from ray_trainer.data.order import Indices, SampleOrder
from ray_trainer.errors import DataError
from ray_trainer.seeding import create_seeded_generator

_READ_ORDER_AHEAD = 16384


class Share(NamedTuple):
    """One rank's indices in a step, a micro-batch each, and how many of them count."""

    micro_batches: list[Indices]
    num_samples: int


class OrderedSource:
    """Step ``t`` of an epoch takes samples ``[t*G, (t+1)*G)`` of its order, dealt out evenly over the ranks.

    Args:
        dataset: what is read. If it has ``announce(indices)``, that is called some steps before they are
            fetched; if it has ``block_sizes``, it is shuffled block by block.
        plan: who takes what.

    Raises:
        DataError: the dataset is empty, or ``drop_last`` leaves nothing of it.
    """

    exact = True

    def __init__(self, dataset: IndexedDataset, plan: BatchPlan) -> None:
        self._dataset = dataset
        self._plan = plan
        sizes = getattr(dataset, "block_sizes", None)
        self._order = SampleOrder(len(dataset), plan.seed, plan.shuffle, sizes)
        self.num_samples = self._samples_of_an_epoch(len(dataset))

    @cached_property
    def fingerprint(self) -> str:
        """Of the dataset; read once."""
        return self._dataset.fingerprint()

    def steps_per_epoch(self) -> int:
        """Number of global batches, a short last one included."""
        return -(-self.num_samples // self._plan.global_batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]:
        """This rank's part of each global batch from ``start`` on. Nothing before it is read.

        Args:
            epoch: counted from 0.
            start: global batches of the epoch that were trained on already.
        """
        shares = self.shares(epoch, start)
        if self._plan.num_loader_workers and self._dataset.reads_in_processes:
            return self._read_in_processes(shares, epoch)
        return self._read_here(shares, epoch)

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """The indices behind `steps`."""
        announce = getattr(self._dataset, "announce", None)
        ahead: deque[Indices] = deque()
        for chunk in self._chunks(epoch, start * self._plan.global_batch_size):
            if announce is not None:
                announce(chunk)
            ahead.append(chunk)
            if len(ahead) == 2:
                yield from self._deal(ahead.popleft())
        for chunk in ahead:
            yield from self._deal(chunk)

    def _samples_of_an_epoch(self, available: int) -> int:
        plan = self._plan
        used = available
        if plan.drop_last:
            used -= available % plan.global_batch_size
            if not used:
                raise DataError(
                    f"The dataset has {available} samples, fewer than one global batch of "
                    f"{plan.global_batch_size}, and drop_last leaves none. Use a smaller batch."
                )
        if plan.limit_batches is not None:
            used = min(used, plan.limit_batches * plan.batch_size * plan.world_size)
        return used

    def _chunks(self, epoch: int, position: int) -> Iterator[Indices]:
        """The rest of the order, in pieces of whole global batches: a call costs more than a sample."""
        size = self._plan.global_batch_size
        length = max(1, _READ_ORDER_AHEAD // size) * size
        for begin in range(position, self.num_samples, length):
            yield self._order.indices(epoch, begin, min(begin + length, self.num_samples))

    def _deal(self, chunk: Indices) -> Iterator[Share]:
        plan = self._plan
        for begin in range(0, len(chunk), plan.global_batch_size):
            yield share_of(chunk[begin : begin + plan.global_batch_size], plan)

    def _read_here(self, shares: Iterator[Share], epoch: int) -> Iterator[StepBatch]:
        fetch = self._dataset.fetch
        for share in shares:
            yield StepBatch([fetch(indices, epoch) for indices in share.micro_batches], share.num_samples)

    def _read_in_processes(self, shares: Iterator[Share], epoch: int) -> Iterator[StepBatch]:
        ahead, now = tee(shares)
        self._requests.pending = ((indices, epoch) for share in ahead for indices in share.micro_batches)
        batches = iter(self._loader)
        for share in now:
            yield StepBatch([next(batches) for _ in share.micro_batches], share.num_samples)

    @cached_property
    def _requests(self) -> "_Requests":
        return _Requests()

    @cached_property
    def _loader(self) -> "DataLoader[Batch]":
        """Processes that live as long as the source, and read in order."""
        return DataLoader(
            _Fetching(self._dataset),
            batch_size=None,
            sampler=self._requests,
            num_workers=self._plan.num_loader_workers,
            persistent_workers=True,
            collate_fn=_unchanged,
            generator=create_seeded_generator(self._plan.seed),  # else starting it draws from the global one
        )


def share_of(global_batch: Indices, plan: BatchPlan) -> Share:
    """The rank's part as `numpy.array_split` cuts it, in micro-batches; a stand-in if there is none."""
    each, extra = divmod(len(global_batch), plan.world_size)
    begin = plan.rank * each + min(plan.rank, extra)
    count = each + (plan.rank < extra)
    if not count:
        return Share([global_batch[:1]], 0)
    size, end = plan.batch_size, begin + count
    return Share([global_batch[at : min(at + size, end)] for at in range(begin, end, size)], count)


class _Requests:
    """What a loader's processes shall read next: a sampler that is filled anew for each epoch."""

    def __init__(self) -> None:
        self.pending: Iterator[tuple[Indices, int]] = iter(())

    def __iter__(self) -> Iterator[tuple[Indices, int]]:
        return self.pending


class _Fetching(Dataset[Batch]):
    """Lets a `DataLoader` fetch whole micro-batches."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: tuple[Indices, int]) -> Batch:
        return self._dataset.fetch(*request)


def _unchanged(batch: Any) -> Any:
    return batch
