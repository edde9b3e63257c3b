"""Blocks of a Ray Dataset, packed so that rows can be gathered from the object store without a copy in between."""

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data.block import Block, BlockAccessor
from xxhash import xxh3_64_intdigest

from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.order import Indices, Words, splitmix
from ray_trainer.data.readers import as_column
from ray_trainer.errors import DataError
from ray_trainer.seeding import derive_seed

Column: TypeAlias = Any  # a NumPy array or an Arrow array; Arrow ships no types

_ROW, _PLACE = 5, 6


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of a block that lies in the object store."""

    start: int
    stop: int


@dataclass(frozen=True)
class ColumnDigest:
    """What is compared of a column: its form, and a sum over its rows that does not depend on where blocks end.

    Attributes:
        form: type and shape of a row.
        content: sum of a hash of each row and its place in the dataset, modulo 2**64.
    """

    form: str
    content: int


Digest = dict[str, ColumnDigest]


@dataclass(frozen=True)
class Pack:
    """Consecutive rows of a dataset, a column in one piece each.

    Numbers, also with a shape, are NumPy arrays ``(rows, ...)``; they stay in the object store, as do Arrow
    arrays of strings and lists.

    Attributes:
        columns: by name.
        digest: of this content, computed where it was made.
    """

    columns: dict[str, Column]
    digest: Digest

    @classmethod
    def of(cls, blocks: list[Block], segments: list[Segment], first_row: int) -> "Pack":
        """Put segments of blocks together.

        Args:
            blocks: one a segment.
            segments: which rows of each.
            first_row: place of the first of them in the dataset, for the digest and for errors.

        Raises:
            DataError: the blocks differ in columns or types.
        """
        parts = []
        for block, segment in zip(blocks, segments, strict=True):
            accessor = BlockAccessor.for_block(block)
            whole = (segment.start, segment.stop) == (0, accessor.num_rows())
            parts.append(_columns_of(block if whole else accessor.slice(segment.start, segment.stop)))
        columns = _joined(parts, first_row)
        return cls(columns, {name: _digest(column, first_row) for name, column in columns.items()})

    def gather(self, rows: Indices) -> dict[str, Any]:
        """The rows as a batch: tensors for numbers, lists for the rest."""
        return {name: finished(taken(column, rows)) for name, column in self.columns.items()}


def taken(column: Column, rows: Indices) -> Column:
    """Copy rows out of a column."""
    return column.take(rows, axis=0) if isinstance(column, np.ndarray) else column.take(pa.array(rows))


def finished(column: Column) -> Any:
    """A column of a batch as the model wants it: a tensor where all rows are numbers of one shape."""
    if isinstance(column, np.ndarray):
        return torch.from_numpy(column) if column.dtype != object else as_column(list(column))
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return _matrix(column)
    return as_column(column.to_pylist())


def combined(digests: list[Digest]) -> Digest:
    """The digest of all packs of a dataset together.

    Raises:
        DataError: they differ in columns or types.
    """
    total = digests[0]
    for place, digest in enumerate(digests[1:], start=1):
        _refuse_difference(_forms(total), _forms(digest), f"pack {place}")
        total = {
            name: ColumnDigest(column.form, (column.content + digest[name].content) % 2**64)
            for name, column in total.items()
        }
    return total


def _matrix(column: Column) -> Any:
    """Lists of equally many numbers as one tensor; others as they are."""
    lengths = column.value_lengths()
    values = column.flatten()
    is_even = not lengths.null_count and pc.min(lengths) == pc.max(lengths) and not values.null_count
    if is_even and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).reshape(len(column), -1).copy())
    return as_column(column.to_pylist())


def _columns_of(block: Block) -> dict[str, Column]:
    """Columns of a block: numbers as NumPy arrays, the rest as it lies in Arrow."""
    table = BlockAccessor.for_block(block).to_arrow()
    arrow = BlockAccessor.for_block(table)
    return {name: _column(arrow, table[name], name) for name in table.column_names}


def _column(block: "BlockAccessor[Any]", column: pa.ChunkedArray, name: str) -> Column:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    is_plain_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if (is_plain_number and not column.null_count) or isinstance(kind, pa.BaseExtensionType):
        return block.to_numpy(name)
    return column.combine_chunks()


def _joined(parts: list[dict[str, Column]], first_row: int) -> dict[str, Column]:
    for part in parts[1:]:
        _refuse_difference(_types(parts[0]), _types(part), f"a block after row {first_row}")
    return {name: _concatenated([part[name] for part in parts]) for name in parts[0]}


def _concatenated(pieces: list[Column]) -> Column:
    if isinstance(pieces[0], np.ndarray):
        return np.ascontiguousarray(np.concatenate(pieces))
    return pa.concat_arrays(pieces)


def _digest(column: Column, first_row: int) -> ColumnDigest:
    hashes = _row_hashes(column)
    places = np.arange(first_row, first_row + len(hashes), dtype=np.uint64)
    mixed = splitmix(hashes ^ splitmix(places, derive_seed(_PLACE)), derive_seed(_ROW))
    return ColumnDigest(_type_of(column), int(mixed.sum(dtype=np.uint64)))


def _row_hashes(column: Column) -> Words:
    """A number of 64 bits for each row; those of up to 8 bytes are their own."""
    if not isinstance(column, np.ndarray) or column.dtype == object:
        values = column.to_pylist() if isinstance(column, pa.Array) else column
        return np.array([int(fingerprint(value)[:16], 16) for value in values], dtype=np.uint64)
    width = column.dtype.itemsize * int(np.prod(column.shape[1:]))
    raw = column.reshape(-1).view(np.uint8)
    if width in (1, 2, 4, 8):
        return cast(Words, raw.view(f"u{width}").astype(np.uint64))
    data = memoryview(cast(Any, raw))
    hashes = [xxh3_64_intdigest(data[at : at + width]) for at in range(0, len(data), width or 1)]
    return np.array(hashes, dtype=np.uint64)


def _type_of(column: Column) -> str:
    if isinstance(column, np.ndarray):
        return f"{column.dtype} {list(column.shape[1:])}"
    return str(column.type)


def _types(columns: dict[str, Column]) -> dict[str, str]:
    return {name: _type_of(column) for name, column in columns.items()}


def _forms(digest: Digest) -> dict[str, str]:
    return {name: column.form for name, column in digest.items()}


def _refuse_difference(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    if expected == found:
        return
    names = sorted(expected.keys() | found.keys())
    differing = [name for name in names if expected.get(name) != found.get(name)]
    listed = "; ".join(f"{name}: {expected.get(name, 'missing')} / {found.get(name, 'missing')}" for name in differing)
    raise DataError(
        f"The Ray Dataset does not have the same columns everywhere: {listed} (at its start / in {where}). "
        "Cast or fill the column in the pipeline; a missing number becomes a float or null, for example."
    )
