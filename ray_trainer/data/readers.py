"""Random access by batches to whatever a user calls a dataset."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from ray_trainer.data.batch import Batch
from ray_trainer.data.description import ColumnDescription, DataDescription, form_of
from ray_trainer.data.fingerprint import fingerprint, sampled_rows, tensor_fingerprint
from ray_trainer.data.indexed import IndexedDataset, origin_of
from ray_trainer.data.order import Indices
from ray_trainer.data.quarantine import BadDataPolicy, Finding, LeftOut, bad_rows_of, is_of_numbers
from ray_trainer.data.samples import Collate, SampleReader, shortened, unreadable
from ray_trainer.errors import DataError

_ROWS_LOOKED_AT = 1 << 16
_LISTS_LOOKED_AT_BYTES = 1 << 30


class TensorReader:
    """Tensors with one row a sample; a batch is a tuple, as from a `TensorDataset`.

    Args:
        tensors: of equal length.
    """

    reads_in_processes = False

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        # index_select is the quicker one, but only where the rows are on the same device and dense
        self._is_plain = all(t.device.type == "cpu" and t.layout is torch.strided for t in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors[0])

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """See `IndexedDataset`."""
        rows = torch.from_numpy(indices)
        if self._is_plain:
            return tuple([tensor.index_select(0, rows) for tensor in self._tensors])
        return tuple([tensor[rows] for tensor in self._tensors])

    def column(self, key: int | str) -> Iterator[Tensor]:
        """All values of a column, in pieces; nothing if there is no such column."""
        if isinstance(key, int):
            yield self._tensors[key]

    def fingerprint(self) -> str:
        """See `IndexedDataset`."""
        return tensor_fingerprint(self._tensors)

    def bad_rows(self, policy: BadDataPolicy) -> list[Finding]:
        """See `IndexedDataset`."""
        dense = [(str(place), t) for place, t in enumerate(self._tensors) if t.layout is torch.strided]
        return [finding for name, tensor in dense for finding in bad_rows_of(name, tensor)]

    def describe(self) -> DataDescription:
        """See `IndexedDataset`; columns are named by their place."""
        columns = {
            str(place): ColumnDescription(form_of(tensor[0]), tensor_fingerprint([tensor]))
            for place, tensor in enumerate(self._tensors if len(self) else ())
        }
        return DataDescription("tensors", len(self), columns)


class ColumnReader:
    """A Hugging Face dataset, read by batches of columns; a batch is a dict.

    Columns of numbers with equal shapes become tensors; strings and ragged columns stay lists.

    Args:
        dataset: has ``column_names`` and takes a list of indices; a format that was set is kept.
    """

    reads_in_processes = True

    def __init__(self, dataset: Any) -> None:
        has_format = (getattr(dataset, "format", None) or {}).get("type") is not None
        plain = has_format or not hasattr(dataset, "with_format")
        self._dataset = dataset if plain else dataset.with_format("torch")

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """See `IndexedDataset`."""
        wanted = indices.tolist()
        try:
            columns = self._dataset[wanted]
        except Exception as error:  # a broken file, an image that does not decode: it is raised again
            raise unreadable(f"One of the samples {shortened(wanted)} could not be read", error) from error
        return {name: as_column(values) for name, values in columns.items()}

    def fingerprint(self) -> str:
        """See `IndexedDataset`; of length, columns and some sampled rows."""
        return fingerprint(len(self), self._dataset.column_names, self._sampled_columns() or None)

    def bad_rows(self, policy: BadDataPolicy) -> list[Finding]:
        """See `IndexedDataset`; of columns of numbers, those of lists only up to 1 GB of data."""
        if not hasattr(self._dataset, "with_format"):
            return []
        tables = self._dataset.with_format("arrow")
        findings: list[Finding] = []
        for first in range(0, len(self), _ROWS_LOOKED_AT) if self._number_columns(policy) else ():
            table = tables.select_columns(self._number_columns(policy))[first : first + _ROWS_LOOKED_AT]
            for name in table.column_names:
                findings += bad_rows_of(name, table[name].combine_chunks(), first)
        return findings

    def _number_columns(self, policy: BadDataPolicy) -> list[str]:
        data = self._dataset.data
        is_small = data.nbytes <= _LISTS_LOOKED_AT_BYTES
        return [
            field.name
            for field in data.schema
            if policy.looks_at(field.name) and is_of_numbers(field.type) and (is_small or field.type.num_fields == 0)
        ]

    def describe(self) -> DataDescription:
        """See `IndexedDataset`; of the same rows as the fingerprint."""
        columns = {
            name: ColumnDescription(form_of(values[0]), fingerprint(values))
            for name, values in self._sampled_columns().items()
        }
        return DataDescription("columns of Hugging Face", len(self), columns)

    def _sampled_columns(self) -> dict[str, Any]:
        rows = np.array(sampled_rows(len(self), limit=64))
        return cast(dict[str, Any], self.fetch(rows)) if len(rows) else {}


class RowsReader:
    """Some rows of another reader, in ascending order.

    Args:
        dataset: what is read.
        rows: the indices in it that count.
    """

    def __init__(self, dataset: IndexedDataset, rows: Indices) -> None:
        self._dataset = dataset
        self._rows = rows
        self.reads_in_processes = dataset.reads_in_processes

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def block_sizes(self) -> list[int] | None:
        """How many of the rows lie in each block, where the dataset has blocks and the rows ascend."""
        sizes = getattr(self._dataset, "block_sizes", None)
        if sizes is None or (np.diff(self._rows) < 0).any():
            return None
        ends = np.searchsorted(self._rows, np.cumsum(sizes))
        return [int(size) for size in np.diff(ends, prepend=0)]

    def column(self, key: int | str) -> Iterator[Tensor]:
        """All values of a column that is in memory."""
        column = getattr(self._dataset, "column", None)
        pieces = [] if column is None else list(column(key))
        if pieces:
            yield torch.cat(pieces)[torch.from_numpy(self._rows)]

    def announce(self, indices: Indices) -> None:
        """Pass on what will be fetched soon."""
        announce = getattr(self._dataset, "announce", None)
        if announce is not None:
            announce(self._rows[indices])

    def origin(self, indices: Indices) -> Indices:
        """See `IndexedDataset`."""
        return origin_of(self._dataset, self._rows[indices])

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """See `IndexedDataset`."""
        return self._dataset.fetch(self._rows[indices], epoch)

    def fingerprint(self) -> str:
        """See `IndexedDataset`."""
        return fingerprint(self._dataset.fingerprint(), self._rows)

    @property
    def left_out(self) -> LeftOut | None:
        """What the dataset was freed from."""
        return getattr(self._dataset, "left_out", None)

    def bad_rows(self, policy: BadDataPolicy) -> list[Finding]:
        """See `IndexedDataset`; those among its rows."""
        bad_rows = getattr(self._dataset, "bad_rows", None)
        found: list[Finding] = [] if bad_rows is None else bad_rows(policy)
        here = [finding._replace(rows=np.flatnonzero(np.isin(self._rows, finding.rows)), paths=()) for finding in found]
        return [finding for finding in here if len(finding.rows)]

    def describe(self) -> DataDescription:
        """See `IndexedDataset`; the columns are those of the whole dataset."""
        return DataDescription.of(self._dataset).resized(len(self))


def as_column(values: Any) -> Any:
    """Numbers of equal shape as one tensor; anything else as it is."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    if isinstance(values, list) and values and all(isinstance(value, Tensor) for value in values):
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values
    if isinstance(values, list) and values and not isinstance(values[0], (str, bytes, Mapping)):
        return _numbers(values)
    return values


def as_indexed(data: Any, seed: int, collate_fn: Collate | None = None) -> IndexedDataset:
    """The reader for a dataset with random access.

    Args:
        data: an `IndexedDataset`, `TensorDataset`, list of tensors, Hugging Face dataset, a `Subset` of one
            of them, or anything with ``__len__`` and ``__getitem__``.
        seed: of the run, for random augmentation.
        collate_fn: makes a batch of a list of samples; given one, samples are read one by one.

    Raises:
        DataError: it cannot be read by index.
    """
    refuse_unsplit(data)
    if collate_fn is None:
        if isinstance(data, IndexedDataset):
            return data
        if isinstance(data, list) and _are_equal_tensors(data):
            return TensorReader([torch.stack(data)])
    base, rows = without_subsets(data)
    if rows is not None:
        return RowsReader(as_indexed(base, seed, collate_fn), rows)
    if collate_fn is None:
        if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
            return TensorReader(data.tensors)
        if hasattr(data, "column_names") and hasattr(data, "features"):
            return ColumnReader(data)
    if not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
        raise DataError(
            f"{type(data).__name__} has no __len__ and __getitem__. Pass a map-style or iterable dataset, a "
            "DataLoader, a Hugging Face dataset or a Ray Dataset."
        )
    return SampleReader(data, collate_fn or default_collate, seed)


def refuse_unsplit(data: Any) -> None:
    """Refuse containers that would pass for a dataset and be read wrongly.

    Raises:
        DataError: it is a dict of datasets, a tuple of tensors or arrays, a single tensor, a data frame or text.
    """
    if isinstance(data, str):
        raise DataError(f"{data!r:.80} is text, not a dataset. Read what it names, and pass the dataset.")
    if hasattr(data, "iloc"):
        raise DataError(
            f"A {type(data).__name__} gives columns, not samples. Pass ray.data.from_pandas(frame) on a cluster, or "
            "TensorDataset(inputs, labels) with tensors of its columns."
        )
    if isinstance(data, Mapping):
        raise DataError(f"A dict with the keys {list(data)} is not a dataset. Pass one of its values.")
    if isinstance(data, Tensor) or (
        isinstance(data, tuple) and any(isinstance(part, Tensor | np.ndarray) for part in data)
    ):
        raise DataError(
            f"A {type(data).__name__} of tensors or arrays could mean samples or columns. "
            "Pass TensorDataset(inputs, labels), or a list with one tensor a sample."
        )


def without_subsets(data: Any) -> tuple[Any, Indices | None]:
    """The dataset below `Subset` objects, and the rows of it that they select."""
    rows: Indices | None = None
    while type(data) is Subset:
        selected = np.asarray(data.indices, dtype=np.int64)
        rows = selected if rows is None else selected[rows]
        data = data.dataset
    return data, rows


def _are_equal_tensors(data: list[Any]) -> bool:
    return bool(data) and all(isinstance(t, Tensor) for t in data) and len({t.shape for t in data}) == 1


def _numbers(values: list[Any]) -> Any:
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        return values
    return torch.from_numpy(array) if array.dtype.kind in "biufc" else values
