"""Steps of a dataset with random access: exact from any position, with any number of ranks."""

import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import tee
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ray_trainer.data.batch import Batch, BatchPlan, StepBatch
from ray_trainer.data.crashing import CrashingSamples, without
from ray_trainer.data.deal import Deal, Share
from ray_trainer.data.description import DataDescription
from ray_trainer.data.indexed import IndexedDataset, origin_of
from ray_trainer.data.order import Indices, SampleOrder
from ray_trainer.data.quarantine import LeftOut, bad_rows_of
from ray_trainer.seeding import create_seeded_generator

logger = logging.getLogger(__name__)


class OrderedSource:
    """Steps in an order that is a function of seed and epoch; nothing is read to find a position.

    Args:
        dataset: what is read. If it has ``announce(indices)``, that is called some steps before they are
            fetched; if it has ``block_sizes``, it is shuffled block by block.
        plan: who takes what.

    Raises:
        DataError: the dataset is empty, or ``drop_last`` leaves nothing of it.
    """

    exact = True
    is_repeatable = True

    def __init__(self, dataset: IndexedDataset, plan: BatchPlan) -> None:
        self._dataset = dataset
        self._plan = plan
        sizes = getattr(dataset, "block_sizes", None)
        self._order = SampleOrder(len(dataset), plan.seed, plan.shuffle, sizes)
        self._deal = Deal(self._order, plan)
        self._crashing: tuple[CrashingSamples, ...] = ()
        self._announce = getattr(dataset, "announce", _to_nobody)

    @property
    def num_samples(self) -> int:
        """Those of an epoch, over all ranks."""
        return self._deal.num_samples

    @cached_property
    def fingerprint(self) -> str:
        """Of the dataset; read once."""
        return self._dataset.fingerprint()

    @property
    def left_out(self) -> LeftOut | None:
        """What of the dataset is not trained on because it is bad."""
        return getattr(self._dataset, "left_out", None)

    @property
    def is_in_memory(self) -> bool:
        """Whether looking at any of it costs next to nothing."""
        return not self._dataset.reads_in_processes

    def describe(self) -> DataDescription:
        """What is told of the dataset beside its fingerprint."""
        return DataDescription.of(self._dataset)

    def column(self, key: int | str) -> Iterator[Tensor]:
        """All values of one column of the dataset, in pieces, where they are in memory; else nothing."""
        column = getattr(self._dataset, "column", None)
        return iter(()) if column is None else column(key)

    def steps_per_epoch(self) -> int:
        """Number of global batches, a short last one included."""
        return self._deal.num_steps()

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]:
        """This rank's part of each global batch from ``start`` on. Nothing before it is read.

        Args:
            epoch: counted from 0.
            start: global batches of the epoch that were trained on already.
        """
        shares = self._deal.shares(epoch, start, self._announce)
        shares = without(shares, self._crashing, epoch, start, len(self._dataset))
        if self._plan.num_loader_workers and self._dataset.reads_in_processes:
            return self._read_in_processes(shares, epoch)
        return self._read_here(shares, epoch)

    def leave_out(self, crashing: Sequence[CrashingSamples]) -> None:
        """Use these samples no more, each from its step on; the order of the others stays what it is."""
        self._crashing = tuple(crashing)

    def samples_at(self, epoch: int, step_in_epoch: int, rank: int, world_size: int) -> list[Indices]:
        """Which samples a rank's micro-batches have at a step, as `steps` gives them."""
        deal = Deal(self._order, replace(self._plan, rank=rank, world_size=world_size))
        shares = deal.shares(epoch, step_in_epoch, _to_nobody)
        return next(without(shares, self._crashing, epoch, step_in_epoch, len(self._dataset))).micro_batches

    def bad_samples(self, epoch: int, step_in_epoch: int, world_size: int) -> list[str]:
        """Where the samples of a step, of all ranks, hold NaN or infinity, in words: they are read again for it."""
        places: list[str] = []
        for rank in range(world_size):
            for indices in self.samples_at(epoch, step_in_epoch, rank, world_size):
                try:
                    batch = self._dataset.fetch(indices, epoch)
                except Exception as error:  # one rank alone looks for an explanation, and must not end for want of it
                    logger.debug("Samples of epoch %d could not be read again: %s", epoch, error)
                    continue
                rows = origin_of(self._dataset, indices)
                for name, column in batch.items() if isinstance(batch, dict) else enumerate(batch):
                    if isinstance(column, Tensor) and len(column.shape) and len(column) == len(rows):
                        findings = bad_rows_of(str(name), column)
                        places += [place for found in findings for place in found.at(rows).places()]
        return list(dict.fromkeys(places))

    def _read_here(self, shares: Iterator[Share], epoch: int) -> Iterator[StepBatch]:
        fetch = self._dataset.fetch
        for share in shares:
            micro_batches = [fetch(indices, epoch) for indices in share.micro_batches]
            yield StepBatch(micro_batches, share.num_samples, share.places)

    def _read_in_processes(self, shares: Iterator[Share], epoch: int) -> Iterator[StepBatch]:
        ahead, now = tee(shares)
        self._requests.pending = ((indices, epoch) for share in ahead for indices in share.micro_batches)
        batches = iter(self._loader)
        for share in now:
            try:
                micro_batches = [next(batches) for _ in share.micro_batches]
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they refer to the loader: see there
                raise
            yield StepBatch(micro_batches, share.num_samples, share.places)

    @cached_property
    def _requests(self) -> "_Requests":
        return _Requests()

    @cached_property
    def _loader(self) -> "DataLoader[Batch]":
        """Processes that live as long as the source, and read in order.

        Nothing it holds may refer back to the source: if the garbage collector takes it apart with its queues,
        rather than the last reference, PyTorch waits 5 seconds for each process.
        """
        return DataLoader(
            _Fetching(self._dataset),
            batch_size=None,
            sampler=self._requests,
            num_workers=self._plan.num_loader_workers,
            persistent_workers=True,
            collate_fn=_unchanged,
            generator=create_seeded_generator(self._plan.seed),  # else starting it draws from the global one
        )


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


def _to_nobody(indices: Indices) -> None:
    pass
