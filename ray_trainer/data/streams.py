"""Steps of sources without random access: loaders and iterables that somebody else built."""

import logging
from collections.abc import Iterator, Mapping, Sized
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ray_trainer.data.batch import Batch, BatchPlan, StepBatch, count_samples
from ray_trainer.data.description import DataDescription
from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.readers import as_indexed
from ray_trainer.data.samples import Collate
from ray_trainer.errors import DataError
from ray_trainer.seeding import isolated_rng, seed_sample
from ray_trainer.state import Stateful

logger = logging.getLogger(__name__)


class StreamSource:
    """Batches of a foreign loader, as they come, grouped into steps.

    Where the loader can save its state (`Stateful`), that is used; else a resumed epoch is read again up to
    the step where it stopped. Generators are seeded from (seed, epoch, batch) before each batch, so a loader
    that shuffles or augments with the global generators repeats itself. They are left as the loader left
    them: training seeds them anew for each step.

    Args:
        loader: what is iterated, once an epoch.
        plan: gives the seed, the limit, and how many batches make a step.

    Raises:
        DataError: there is more than one rank, or the loader is empty.
    """

    num_samples: int | None = None

    def __init__(self, loader: "DataLoader[Any]", plan: BatchPlan) -> None:
        self._loader = loader
        self._plan = plan
        self._batches_per_step = max(1, plan.global_batch_size // (plan.batch_size * plan.world_size))
        self._stateful = _stateful_part(loader)
        self.is_repeatable = self._stateful is None
        self._position = (0, 0)
        self._restored: dict[str, Any] | None = None
        self._refuse_unusable()
        reason = self._reason_for_inexactness()
        self.exact = reason is None
        if reason is not None:
            logger.warning("A resumed run may not see the same data: %s", reason)

    @property
    def fingerprint(self) -> str:
        """Of the dataset if it has random access, else of its type alone."""
        dataset = self._loader.dataset
        content = as_indexed(dataset, self._plan.seed).fingerprint() if _has_random_access(dataset) else None
        return fingerprint(self._name, self._loader.batch_size, content)

    def describe(self) -> DataDescription:
        """What is told beside the fingerprint; of the dataset, where that has random access."""
        kind = f"a loader of {self._name} with batches of {self._loader.batch_size}"
        if not _has_random_access(self._loader.dataset):
            return DataDescription(kind, None)
        return replace(DataDescription.of(as_indexed(self._loader.dataset, self._plan.seed)), kind=kind)

    def steps_per_epoch(self) -> int | None:
        """Number of steps, or None where the loader does not know its length."""
        batches = _length(self._loader)
        limit = self._plan.limit_batches
        if batches is None:
            return None
        return -(-(batches if limit is None else min(batches, limit)) // self._batches_per_step)

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]:
        """The steps of an epoch from ``start`` on.

        Args:
            epoch: counted from 0.
            start: steps of the epoch that were trained on already.

        Raises:
            DataError: there is no batch at all.
        """
        first = start * self._batches_per_step
        batches = self._batches(epoch, first)
        if self._plan.limit_batches is not None:
            batches = islice(batches, max(0, self._plan.limit_batches - first))
        while micro_batches := list(islice(batches, self._batches_per_step)):
            first += len(micro_batches)
            self._position = (epoch, first)
            num_samples = sum(count_samples(batch) for batch in micro_batches)
            yield StepBatch(micro_batches, num_samples, tuple(range(len(micro_batches))))
        if first == 0:
            raise DataError(f"{self._name} is empty: it gave no batch in epoch {epoch}.")

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands after the newest step; empty if it cannot tell."""
        if self._stateful is None:
            return {}
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches, "loader": self._stateful.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `steps` of the same place go on from a state instead of reading again."""
        self._restored = dict(state) if state else None

    def _batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Batches of an epoch after the first ``skip`` ones."""
        restored = self._restored
        self._restored = None
        _announce_epoch(self._loader, epoch)
        if self._stateful is not None and restored and (restored["epoch"], restored["batches"]) == (epoch, skip):
            self._stateful.load_state_dict(restored["loader"])
            return self._seeded(epoch, skip)
        batches = self._seeded(epoch, 0)
        if skip:
            logger.info("Reading %d batches of %s again to reach the step to go on from.", skip, self._name)
            skipped = sum(1 for _ in islice(batches, skip))
            if skipped < skip:
                raise DataError(
                    f"{self._name} ended after {skipped} batches, but {skip} of epoch {epoch} were trained "
                    "on before. The data changed; train from the start, or bring back what was there."
                )
        return batches

    def _seeded(self, epoch: int, index: int) -> Iterator[Batch]:
        seed = self._plan.seed
        with isolated_rng():  # a sampler draws its seed with the first batch
            seed_sample(seed, epoch, -1 - index)
            _seed_own_generators(self._loader)
            batches = iter(self._loader)
            batch = next(batches, None)
        while batch is not None:
            yield batch
            index += 1
            seed_sample(seed, epoch, -1 - index)
            batch = next(batches, None)

    @property
    def _name(self) -> str:
        return type(getattr(self._loader.dataset, "iterable", self._loader.dataset)).__name__

    def _refuse_unusable(self) -> None:
        if self._plan.world_size > 1:
            raise DataError(
                f"A loader or iterable over {self._name} cannot be shared between {self._plan.world_size} "
                "workers: each of them would train on all of it. Pass the dataset itself, with random "
                "access, or a Ray Dataset."
            )
        if _length(self._loader) == 0:
            raise DataError(f"The loader over {self._name} is empty; there must be at least 1 batch to train on.")

    def _reason_for_inexactness(self) -> str | None:
        if self._stateful is not None:
            return None
        if _has_lossy_state(self._loader.dataset):
            return (
                f"the state of {self._name} leaves out its shuffle buffer, so it is read again from its start and must "
                "give the same again. Shuffle it before, for example its shards alone, to go on without that."
            )
        if isinstance(self._loader.dataset, IterableDataset):
            return (
                f"{self._name} has no state_dict and no random access, so it is read again from its start "
                "and must give the same again. Give it state_dict and load_state_dict, or pass a dataset "
                "with __len__ and __getitem__."
            )
        if self._loader.num_workers and self._loader.persistent_workers:
            return (
                "persistent_workers of the DataLoader keep their generators between epochs, so random "
                "augmentation starts anew in a resumed run. Pass the dataset itself."
            )
        return None


def as_loader(data: Any, plan: BatchPlan, collate_fn: Collate | None = None) -> "DataLoader[Any]":
    """A loader in this process over an iterable that gives samples.

    Raises:
        DataError: it can be iterated only once.
    """
    if hasattr(data, "__next__"):
        raise DataError(
            f"A {type(data).__name__} can be read only once, but training needs it each epoch and after a "
            "restart. Pass an object whose __iter__ starts anew."
        )
    if collate_fn is None and hasattr(data, "with_format"):  # of Hugging Face, which gives lists where nothing is set
        data = data.with_format("torch")
    dataset = data if isinstance(data, IterableDataset) else _Stream(data)
    return DataLoader(dataset, batch_size=plan.batch_size, collate_fn=collate_fn, drop_last=plan.drop_last)


class _Stream(IterableDataset[Any]):
    """Something iterable that does not derive from PyTorch's class."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)


def _stateful_part(loader: "DataLoader[Any]") -> Stateful | None:
    """What knows the position: the loader, or its dataset while no process reads ahead."""
    candidates: list[Any] = [loader]
    if loader.num_workers == 0:
        candidates += [loader.dataset, getattr(loader.dataset, "iterable", None)]
    for candidate in candidates if not _has_lossy_state(loader.dataset) else ():
        if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
            return candidate  # type: ignore[no-any-return]  # found by its two methods
    return None


def _has_lossy_state(dataset: Any) -> bool:
    """Whether it is a streamed Hugging Face dataset with a shuffle buffer, which is not in its state (datasets 5.2)."""
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None and not type(part).__name__.startswith("BufferShuffled"):
        part = getattr(part, "ex_iterable", None)
    return part is not None


def _announce_epoch(loader: "DataLoader[Any]", epoch: int) -> None:
    """Tell samplers and datasets that shuffle by epoch which one it is, by the usual name."""
    iterable = getattr(loader.dataset, "iterable", None)
    for part in (loader.sampler, loader.batch_sampler, loader.dataset, iterable):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _seed_own_generators(loader: "DataLoader[Any]") -> None:
    """Generators that the user gave to the loader count on from epoch to epoch; start them anew."""
    for part in (loader, loader.sampler):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))


def _has_random_access(dataset: Any) -> bool:
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")


def _length(loader: "DataLoader[Any]") -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
