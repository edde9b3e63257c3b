"""Reading a map-style dataset sample by sample, with randomness that belongs to the sample."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor

from ray_trainer.data.batch import Batch
from ray_trainer.data.description import DataDescription, describe_fields, form_of
from ray_trainer.data.fingerprint import fingerprint, sampled_rows
from ray_trainer.data.order import Indices
from ray_trainer.data.quarantine import BadDataPolicy, Finding, LeftOut
from ray_trainer.errors import DataError
from ray_trainer.seeding import generators_moved, isolated_rng, mark_generators, seed_sample
from ray_trainer.users_code import users_line

logger = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


class SampleReader:
    """Any map-style dataset, read sample by sample and collated.

    Python's, NumPy's and PyTorch's generators are as if seeded from (seed, epoch, index) before each sample, so
    random augmentation depends on nothing else. A batch in which a dataset draws for the first time is read
    again with seeds; one that never draws is never seeded. A dataset that reads several samples at once
    (``__getitems__``) is seeded once a batch, from its first index.

    Args:
        dataset: has ``__len__`` and ``__getitem__``. What it has of an `IndexedDataset` beside ``fetch`` is
            used: fingerprint, blocks, announcements.
        collate: makes a batch of a list of samples.
        seed: of the run.
    """

    def __init__(self, dataset: Any, collate: Collate, seed: int) -> None:
        self._dataset = dataset
        self._collate = collate
        self._seed = seed
        self._name = type(dataset).__qualname__
        self._draws = False
        self._reads_many = callable(getattr(dataset, "__getitems__", None))
        self.reads_in_processes: bool = getattr(dataset, "reads_in_processes", True)
        self.block_sizes: list[int] | None = getattr(dataset, "block_sizes", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def announce(self, indices: Indices) -> None:
        """Pass on what will be fetched soon."""
        announce = getattr(self._dataset, "announce", None)
        if announce is not None:
            announce(indices)

    @property
    def left_out(self) -> LeftOut | None:
        """What the dataset was freed from."""
        return getattr(self._dataset, "left_out", None)

    def bad_rows(self, policy: BadDataPolicy) -> list[Finding]:
        """Those that the dataset tells of itself: looking for them would mean to read every sample."""
        bad_rows = getattr(self._dataset, "bad_rows", None)
        if bad_rows is not None:
            return cast(list[Finding], bad_rows(policy))
        if policy.action == "quarantine":
            logger.warning(
                "%s is read sample by sample, so on_bad_data cannot look for bad samples in it before training. "
                "One that cannot be read ends the run, with its number.",
                self._name,
            )
        return []

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """See `IndexedDataset`."""
        wanted = indices.tolist()
        with isolated_rng():
            read = self._read_many if self._reads_many else self._read_each
            samples = read(wanted, self._seed, epoch)
            seed_sample(self._seed, epoch, -1 - wanted[0])  # for collators that draw, such as masking
            try:
                return cast(Batch, self._collate(samples))
            except Exception as error:  # the user's collator may raise anything; it is raised again
                raise DataError(
                    f"The samples {shortened(wanted)} could not be put into one batch: "
                    f"{type(error).__name__}: {str(error).rstrip('.')}. {_differences(wanted, samples)}"
                    "Pass a collate_fn that can, for example one that pads."
                ) from error

    def fingerprint(self) -> str:
        """See `IndexedDataset`; of a few samples, or of their form if reading one twice gives two results."""
        if callable(getattr(self._dataset, "fingerprint", None)):
            return str(self._dataset.fingerprint())
        rows = sampled_rows(len(self), limit=8)
        with isolated_rng():
            content, again = (fingerprint(self._read_each(rows, seed=0, epoch=0)) for _ in range(2))
            if content != again:
                content = fingerprint(_form(self._read_each(rows[:1], seed=0, epoch=0)))
                logger.warning(
                    "Reading the samples %s of %s twice gives two results: they draw from a generator of "
                    "their own, so a resumed run may see other augmentation. Draw from random, numpy.random "
                    "or torch.",
                    shortened(rows),
                    self._name,
                )
        return fingerprint(self._name, len(self), content)

    def describe(self) -> DataDescription:
        """See `IndexedDataset`; of a few samples, without the content of what differs from reading to reading."""
        if callable(getattr(self._dataset, "describe", None)):
            return DataDescription.of(self._dataset)
        rows = sampled_rows(len(self), limit=8)
        with isolated_rng():
            first, again = (describe_fields(self._read_each(rows, seed=0, epoch=0)) if rows else {} for _ in range(2))
        unstable = {name: found._replace(content="") for name, found in first.items() if found != again.get(name)}
        return DataDescription(self._name, len(self), first | unstable)

    def _read_each(self, wanted: list[int], seed: int, epoch: int) -> list[Any]:
        """One by one, each seeded; that costs 10 microseconds, so only once the dataset was seen to draw."""
        if not self._draws:
            mark_generators()
            samples = [self._read(index) for index in wanted]
            self._draws = generators_moved()
            if not self._draws:
                return samples
        samples = []
        for index in wanted:
            seed_sample(seed, epoch, index)
            samples.append(self._read(index))
        return samples

    def _read(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:  # the user's dataset may raise anything; it is raised again
            raise unreadable(f"Sample {index} of {self._name} could not be read", error) from error

    def _read_many(self, wanted: list[int], seed: int, epoch: int) -> list[Any]:
        seed_sample(seed, epoch, wanted[0])
        try:
            return list(self._dataset.__getitems__(wanted))
        except Exception as error:  # read again one by one, to name the sample
            self._read_each(wanted, seed, epoch)
            raise unreadable(
                f"The samples {shortened(wanted)} of {self._name} could not be read together", error
            ) from error


def unreadable(what: str, error: Exception) -> DataError:
    """The error to raise for samples that could not be read."""
    explained = DataError(f"{what}: {type(error).__name__}: {error}{users_line(error)}")
    explained.is_transient = isinstance(error, OSError)
    return explained


def shortened(indices: list[int]) -> str:
    """Indices for a message; the first ones if they are many."""
    shown = ", ".join(str(index) for index in indices[:8])
    return f"[{shown}, ... {len(indices)} in all]" if len(indices) > 8 else f"[{shown}]"


def _form(value: Any) -> Any:
    """Types and shapes without the content."""
    if isinstance(value, (Tensor, np.ndarray)):
        return [str(value.dtype), list(value.shape)]
    if isinstance(value, Mapping):
        return {str(key): _form(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_form(item) for item in value]
    return type(value).__name__


def _differences(wanted: list[int], samples: list[Any]) -> str:
    """Which of some samples that cannot be stacked is not like the others, as a sentence; empty where all are."""
    columns = {"": samples}
    if all(isinstance(sample, Mapping) for sample in samples):
        columns |= {f"{key!r} of ": [sample.get(key) for sample in samples] for key in samples[0]}
    elif all(isinstance(sample, tuple | list) for sample in samples):
        columns |= {f"element {place} of ": list(column) for place, column in enumerate(zip(*samples, strict=False))}
    found = [_odd_one(wanted, values, of) for of, values in columns.items()]
    return f"Not all are alike: {'; '.join(filter(None, found))}. " if any(found) else ""


def _odd_one(wanted: list[int], values: list[Any], of: str) -> str:
    forms = [form_of(value) for value in values]
    usual = Counter(forms).most_common(1)[0][0]
    place = next((place for place, form in enumerate(forms) if form != usual), None)
    return "" if place is None else f"{of}sample {wanted[place]} is {forms[place]}, of others {usual}"
