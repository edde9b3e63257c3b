"""Rows that cannot be trained on: finding them before training, refusing them or leaving them out."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ray_trainer.data.batch import Batch
from ray_trainer.data.description import DataDescription
from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.indexed import IndexedDataset, origin_of
from ray_trainer.data.order import Indices
from ray_trainer.errors import DataError

_TOLD = 20  # places that are listed
_PIECE = 1 << 22  # values looked at together, so that nothing as large as the data is made


@dataclass(frozen=True)
class BadDataPolicy:
    """What is done with bad rows and files.

    Attributes:
        action: ``refuse``, ``quarantine`` (leave them out) or ``keep`` (do not look).
        max_ratio: part of the rows, or of the files, above which they are refused rather than left out.
        columns: those that the task reads, by name or place; None for all.
    """

    action: Literal["refuse", "quarantine", "keep"] = "refuse"
    max_ratio: float = 0.01
    columns: frozenset[str] | None = None

    @property
    def looks(self) -> bool:
        """Whether anything is searched."""
        return self.action != "keep"

    def looks_at(self, column: str) -> bool:
        """Whether the values of a column matter."""
        return self.looks and (self.columns is None or column in self.columns)


KEEP = BadDataPolicy("keep")


class Finding(NamedTuple):
    """Bad rows of one column and kind.

    Attributes:
        column: its name.
        reason: ``NaN``, ``infinity`` or ``missing``.
        rows: their indices, ascending.
        paths: the files of the first of them, where they are known.
    """

    column: str
    reason: str
    rows: Indices
    paths: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The kind, for counting."""
        return f"{self.reason} in column {self.column!r}"

    def at(self, origin: Indices) -> "Finding":
        """The same, with the row in ``origin`` in place of its index there."""
        return self._replace(rows=origin[self.rows])

    def places(self) -> Iterator[str]:
        """The first rows, in words."""
        for place, row in enumerate(self.rows[:_TOLD].tolist()):
            of_file = f" (file {self.paths[place]})" if place < len(self.paths) else ""
            yield f"row {row}{of_file}: {self.label}"


@dataclass(frozen=True)
class LeftOut:
    """What is not trained on because it is bad.

    Attributes:
        num_rows: rows that were there and could be counted.
        num_files: files that could not be read.
        reasons: how many rows or files for each reason; a row may have several.
        places: the first of them.
    """

    num_rows: int = 0
    num_files: int = 0
    reasons: dict[str, int] | None = None
    places: tuple[str, ...] = ()

    def __add__(self, other: "LeftOut") -> "LeftOut":
        reasons = dict(self.reasons or {})
        for reason, count in (other.reasons or {}).items():
            reasons[reason] = reasons.get(reason, 0) + count
        places = (self.places + other.places)[:_TOLD]
        return LeftOut(self.num_rows + other.num_rows, self.num_files + other.num_files, reasons, places)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "places": list(self.places)}


class WithoutRows:
    """Another dataset without some of its rows; the others keep their order.

    Args:
        dataset: what is read.
        rows: those that are left out, ascending.
        left_out: what is told of them.
    """

    def __init__(self, dataset: IndexedDataset, rows: Indices, left_out: LeftOut) -> None:
        self._dataset = dataset
        self._rows = rows
        self._before = rows - np.arange(len(rows))  # how many rows stay before each that goes
        self.left_out = left_out
        self.reads_in_processes = dataset.reads_in_processes

    def __len__(self) -> int:
        return len(self._dataset) - len(self._rows)

    @cached_property
    def block_sizes(self) -> list[int] | None:
        """Rows that stay of each block, where the dataset has blocks."""
        sizes = getattr(self._dataset, "block_sizes", None)
        if sizes is None:
            return None
        gone = np.diff(np.searchsorted(self._rows, np.cumsum(sizes)), prepend=0)
        return [int(size) for size in np.asarray(sizes) - gone]

    def column(self, key: int | str) -> Iterator[Tensor]:
        """All values of a column that is in memory."""
        column = getattr(self._dataset, "column", None)
        first = 0
        for piece in () if column is None else column(key):
            stays = np.ones(len(piece), dtype=bool)
            begin, end = np.searchsorted(self._rows, [first, first + len(piece)])
            stays[self._rows[begin:end] - first] = False
            first += len(piece)
            yield piece[torch.from_numpy(stays)]

    def announce(self, indices: Indices) -> None:
        """Pass on what will be fetched soon."""
        announce = getattr(self._dataset, "announce", None)
        if announce is not None:
            announce(self._places(indices))

    def origin(self, indices: Indices) -> Indices:
        """See `IndexedDataset`."""
        return origin_of(self._dataset, self._places(indices))

    def fetch(self, indices: Indices, epoch: int = 0) -> Batch:
        """See `IndexedDataset`."""
        return self._dataset.fetch(self._places(indices), epoch)

    def fingerprint(self) -> str:
        """See `IndexedDataset`."""
        return fingerprint(self._dataset.fingerprint(), "without", self._rows)

    def describe(self) -> DataDescription:
        """See `IndexedDataset`."""
        return DataDescription.of(self._dataset).resized(len(self))

    def _places(self, indices: Indices) -> Indices:
        shifted: Indices = indices + np.searchsorted(self._before, indices, side="right")
        return shifted


def checked(dataset: IndexedDataset, policy: BadDataPolicy) -> IndexedDataset:
    """The dataset as a policy wants it.

    Only what a dataset can tell by ``bad_rows(policy)`` is known; one that is read sample by sample tells nothing.

    Raises:
        DataError: rows are bad and the policy refuses them, or they are more than it allows.
    """
    bad_rows = getattr(dataset, "bad_rows", None)
    findings: list[Finding] = [] if bad_rows is None or not policy.looks else bad_rows(policy)
    if not findings:
        return dataset
    rows = np.unique(np.concatenate([finding.rows for finding in findings]))
    reasons: dict[str, int] = {}
    for finding in findings:
        reasons[finding.label] = reasons.get(finding.label, 0) + len(finding.rows)
    left_out = LeftOut(len(rows), 0, reasons, _first_places(findings))
    refuse_beyond(policy, len(rows), len(dataset), "rows", left_out)
    earlier = getattr(dataset, "left_out", None)
    return WithoutRows(dataset, rows, left_out if earlier is None else earlier + left_out)


def refuse_beyond(policy: BadDataPolicy, bad: int, total: int, what: str, left_out: LeftOut) -> None:
    """Refuse bad rows or files that a policy does not leave out.

    Raises:
        DataError: it refuses any, or there are too many.
    """
    listed = "\n".join(f"  {place}" for place in left_out.places)
    more = bad - len(left_out.places)
    listed += f"\n  and {more:,} more" if more > 0 else ""
    if policy.action != "quarantine":
        raise DataError(
            f"{bad:,} of {total:,} {what} cannot be trained on:\n{listed}\nRepair or remove them, set on_bad_data to "
            "'quarantine' to leave them out, or to 'keep' to train on them as they are."
        )
    if bad > policy.max_ratio * total:
        raise DataError(
            f"{bad:,} of {total:,} {what} cannot be trained on, more than max_bad_ratio ({policy.max_ratio:g}) "
            f"allows to leave out:\n{listed}\nRepair the data, or raise max_bad_ratio."
        )


def without_empty_columns(findings: list[Finding], num_rows: int) -> list[Finding]:
    """Without columns that have no value in any row: nothing is missing where nothing ever was."""
    counts: dict[str, int] = {}
    for finding in findings:
        if finding.reason == "missing":
            counts[finding.column] = counts.get(finding.column, 0) + len(finding.rows)
    empty = {column for column, count in counts.items() if count == num_rows}
    return [finding for finding in findings if finding.column not in empty]


def bad_rows_of(column: str, values: Any, first_row: int = 0, missing: Any = None) -> list[Finding]:
    """Rows of a column of numbers that hold NaN, infinity or nothing.

    Args:
        column: its name.
        values: a NumPy array or tensor ``(rows, ...)``, or an Arrow array of numbers or of lists of them.
        first_row: index of its first row.
        missing: mask of the rows without a value, where `values` cannot show it.
    """
    if isinstance(values, pa.Array):
        nan, infinite, missing = _masks_of_arrow(values)
    else:
        nan, infinite = _masks(values)
    found = []
    taken = np.zeros(len(values), dtype=bool)
    for reason, mask in (("missing", missing), ("NaN", nan), ("infinity", infinite)):
        if mask is not None and mask.any():
            rows = np.flatnonzero(mask & ~taken)
            taken |= mask
            if len(rows):
                found.append(Finding(column, reason, rows.astype(np.int64) + first_row))
    return found


def is_of_numbers(kind: Any) -> bool:
    """Whether an Arrow type is a number or a list of them."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _first_places(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The first rows of all findings, in the order of the data."""
    by_row = sorted(
        ((int(row), place) for found in findings for row, place in zip(found.rows, found.places(), strict=False)),
        key=lambda each: each[0],
    )
    return tuple(place for _, place in by_row[:_TOLD])


def _masks(values: Any) -> tuple[Any, Any]:
    """Which rows hold NaN, and which infinity; None where there is none."""
    tensor = values if isinstance(values, Tensor) else None
    kind_fits = tensor.is_floating_point() if tensor is not None else values.dtype.kind == "f"
    if not kind_fits or not len(values):
        return None, None
    width = max(1, int(np.prod(values.shape[1:])))
    nan, infinite = np.zeros(len(values), dtype=bool), np.zeros(len(values), dtype=bool)
    length = max(1, _PIECE // width)
    for begin in range(0, len(values), length):
        piece = values[begin : begin + length].reshape(-1, width)
        with np.errstate(all="ignore"):
            total = float(piece.sum())
        if np.isfinite(total):  # neither can vanish in a sum, and this is the quick way
            continue
        exact = piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))
        nan[begin : begin + length] = exact.isnan().any(dim=1).cpu().numpy()
        infinite[begin : begin + length] = exact.isinf().any(dim=1).cpu().numpy()
    return nan, infinite


def _masks_of_arrow(values: Any) -> tuple[Any, Any, Any]:
    """The same for Arrow, and which rows hold a null; of lists, in any of their elements."""
    missing = values.is_null().to_numpy(zero_copy_only=False)
    if not is_of_numbers(values.type):
        return None, None, None
    parents = np.arange(len(values))
    while not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        parents = parents[pc.list_parent_indices(values).to_numpy(zero_copy_only=False)]
        values = pc.list_flatten(values)
        missing[parents[values.is_null().to_numpy(zero_copy_only=False)]] = True
    nan, infinite = np.zeros(len(missing), dtype=bool), np.zeros(len(missing), dtype=bool)
    if pa.types.is_floating(values.type):
        floats = values.fill_null(0).to_numpy(zero_copy_only=False)
        nan[parents[np.isnan(floats)]] = True
        infinite[parents[np.isinf(floats)]] = True
    return nan, infinite, missing
