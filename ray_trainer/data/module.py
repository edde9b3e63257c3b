"""Training and validation data of one task, as sources for a plan or as plain loaders."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from ray_trainer.data.batch import Batch, BatchPlan
from ray_trainer.data.collate import CollatorRegistry, HasModality
from ray_trainer.data.factory import choose_collator
from ray_trainer.data.order import Indices, permuted
from ray_trainer.data.quarantine import KEEP, BadDataPolicy, checked
from ray_trainer.data.readers import RowsReader, as_indexed
from ray_trainer.data.samples import Collate
from ray_trainer.data.source import BatchSource, build_source
from ray_trainer.errors import DataError
from ray_trainer.seeding import derive_seed

_SPLIT = 4  # see ray_trainer.seeding: keeps the split independent of everything else that is drawn


class UniversalDataModule:
    """Data of one task.

    Args:
        train_data: anything `build_source` takes.
        val_data: the same, or None.
        task_spec: chooses the collator.
        tokenizer: for text.
        batch_size: of the plain loaders; sources take theirs from the plan.
        val_split: share of the training data to hold back if there is no validation data; 0 holds back none.
        num_workers: processes of the plain loaders.
        seed: of the split and of the order of the plain loaders.
        collator_registry: None takes the shared one.
        collate_fn: makes a batch of a list of samples; wins over the registry.
        bad_data: what is done with bad rows.
    """

    def __init__(
        self,
        train_data: Any,
        val_data: Any = None,
        task_spec: HasModality | None = None,
        tokenizer: Any = None,
        batch_size: int = 32,
        val_split: float = 0.2,
        num_workers: int = 2,
        seed: int = 42,
        collator_registry: CollatorRegistry | None = None,
        collate_fn: Collate | None = None,
        bad_data: BadDataPolicy = KEEP,
    ) -> None:
        self._task_spec = task_spec
        self._tokenizer = tokenizer
        self._registry = collator_registry or CollatorRegistry.get_instance()
        self._collate_fn = collate_fn
        self._bad_data = bad_data
        self._plan = BatchPlan(batch_size, batch_size, seed=seed, num_loader_workers=num_workers)
        self._epoch = 0
        self.train_data, self.val_data = train_data, val_data
        if val_data is None and val_split > 0:
            self.train_data, self.val_data = self._split(train_data, val_split, seed)

    def train_source(self, plan: BatchPlan) -> BatchSource:
        """The training data, dealt out by a plan.

        Raises:
            DataError: it is empty or cannot be read.
        """
        return build_source(self.train_data, plan, self._collator(self.train_data), self._bad_data)

    def val_source(self, plan: BatchPlan) -> BatchSource | None:
        """The validation data in its own order and to its last sample, or None.

        Raises:
            DataError: it is empty or cannot be read.
        """
        if self.val_data is None:
            return None
        plan = replace(plan, shuffle=False, drop_last=False)
        try:
            return build_source(self.val_data, plan, self._collator(self.val_data), self._bad_data)
        except DataError as error:
            raise DataError(f"The validation data cannot be used: {error}") from error

    def train_dataloader(self, epoch: int | None = None) -> "DataLoader[Batch]":
        """A loader over the training data.

        Args:
            epoch: whose order it gives; None goes on to the next epoch each time any such loader is iterated.
        """
        return DataLoader(_Epochs(self, epoch), batch_size=None, collate_fn=_unchanged)

    def val_dataloader(self) -> "DataLoader[Batch] | None":
        """A loader over the validation data, or None."""
        source = self.val_source(self._plan)
        return None if source is None else DataLoader(_Steps(source), batch_size=None, collate_fn=_unchanged)

    @cached_property
    def loader_source(self) -> BatchSource:
        """What the plain training loader reads from."""
        return self.train_source(self._plan)

    def next_epoch(self) -> int:
        """Count the epochs of training loaders that were not told which one they are."""
        self._epoch += 1
        return self._epoch - 1

    def _collator(self, data: Any) -> Collate | None:
        if isinstance(data, (DataLoader, RowsReader)):
            return None
        if self._collate_fn is not None:
            return self._collate_fn
        return choose_collator(data, self._task_spec, self._tokenizer, self._registry)

    def _split(self, data: Any, fraction: float, seed: int) -> tuple[RowsReader, RowsReader]:
        if isinstance(data, (DataLoader, IterableDataset)) or not hasattr(data, "__getitem__"):
            raise DataError(
                f"A {type(data).__name__} cannot be split for validation, because it has no random access. "
                "Pass validation data, or set the split to 0."
            )
        reader = checked(as_indexed(data, seed, self._collator(data)), self._bad_data)
        train_rows, val_rows = split_rows(len(reader), fraction, seed)
        return RowsReader(reader, train_rows), RowsReader(reader, val_rows)


def split_rows(num_samples: int, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Indices to train on and to validate on, ascending; each sample in one of them, none of them empty.

    Args:
        num_samples: at least 2.
        fraction: share to validate on, between 0 and 1, rounded to whole samples.
        seed: another one gives another split.

    Raises:
        DataError: there are too few samples, or the fraction leaves nothing to train on.
    """
    if num_samples < 2 or not 0 < fraction < 1:
        raise DataError(
            f"{num_samples} samples cannot be split with a share of {fraction} for validation. "
            "There must be at least 2 samples, and a share between 0 and 1."
        )
    num_held_back = min(max(round(num_samples * fraction), 1), num_samples - 1)
    is_held_back = np.zeros(num_samples, dtype=bool)
    is_held_back[permuted(num_samples, derive_seed(_SPLIT, seed), 0, num_held_back)] = True
    return np.flatnonzero(~is_held_back), np.flatnonzero(is_held_back)


class _Steps(IterableDataset[Batch]):
    """The micro-batches of one epoch of a source."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Batch]:
        for step in self._source.steps(epoch=0):
            yield from step.micro_batches


class _Epochs(IterableDataset[Batch]):
    """The micro-batches of one epoch of a module's training data after the other."""

    def __init__(self, module: UniversalDataModule, epoch: int | None) -> None:
        self._module = module
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._module.next_epoch() if self._epoch is None else self._epoch
        for step in self._module.loader_source.steps(epoch):
            yield from step.micro_batches


def _unchanged(batch: Any) -> Any:
    return batch
