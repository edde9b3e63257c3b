"""Blocks of a Ray Dataset, packed so that rows can be gathered from the object store without a copy in between."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data.block import Block, BlockAccessor
from xxhash import xxh3_64_intdigest

from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.order import Indices, Words, splitmix
from ray_trainer.data.quarantine import KEEP, BadDataPolicy, Finding, bad_rows_of
from ray_trainer.data.readers import as_column
from ray_trainer.errors import DataError
from ray_trainer.seeding import derive_seed

Column: TypeAlias = Any  # a NumPy array or an Arrow array; Arrow ships no types

_ROW, _PLACE = 5, 6
_NOTHING = str(pa.null())  # the form of a column without any value
_PATHS_KEPT = 20


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
        findings: rows that cannot be trained on, where they were searched. A number that is missing in them is
            written as 0.
    """

    columns: dict[str, Column]
    digest: Digest
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: list[Block], segments: list[Segment], first_row: int, policy: BadDataPolicy = KEEP) -> "Pack":
        """Put segments of blocks together.

        Args:
            blocks: one a segment.
            segments: which rows of each.
            first_row: place of the first of them in the dataset, for the digest and for errors.
            policy: which columns are searched for bad rows.

        Raises:
            DataError: the blocks differ in columns or types.
        """
        parts = []
        for block, segment in zip(blocks, segments, strict=True):
            accessor = BlockAccessor.for_block(block)
            whole = (segment.start, segment.stop) == (0, accessor.num_rows())
            parts.append(_part_of(block if whole else accessor.slice(segment.start, segment.stop), policy))
        columns, missing = _joined(parts, first_row)
        findings = [
            finding
            for name, column in columns.items()
            if policy.looks_at(name)
            for finding in bad_rows_of(name, column, first_row, missing.get(name))
        ]
        for name, mask in missing.items():
            if mask.all():  # it may be a column without values everywhere, and no number shall be invented
                columns[name] = pa.nulls(len(mask))
        digest = {name: _digest(column, first_row) for name, column in columns.items()}
        return cls(columns, digest, [_with_paths(finding, columns, first_row) for finding in findings])

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


def combined(digests: list[Digest], allows_nothing: bool = True) -> Digest:
    """The digest of all packs of a dataset together.

    Args:
        digests: of each.
        allows_nothing: a column may be without any value in some packs, whose rows are bad then.

    Raises:
        DataError: they differ in columns or types.
    """
    total = digests[0]
    for place, digest in enumerate(digests[1:], start=1):
        before, after = _forms(total), _forms(digest)
        if allows_nothing:
            without = {name for name in before if _NOTHING in (before[name], after.get(name))}
            before, after = ({n: form for n, form in forms.items() if n not in without} for forms in (before, after))
        _refuse_difference(before, after, f"pack {place}")
        total = {
            name: ColumnDigest(
                digest[name].form if column.form == _NOTHING else column.form,
                (column.content + digest[name].content) % 2**64,
            )
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


def path_of(paths: Column, row: int) -> str | None:
    """The file of a row, if the column holds text, as the one that ``include_paths=True`` adds does."""
    if isinstance(paths, pa.Array) and (pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type)):
        return cast(str | None, paths[row].as_py())
    return None


@dataclass(frozen=True)
class _Part:
    """A part of a pack: its columns, and masks of the rows in which one of them has no number."""

    columns: dict[str, Column]
    missing: dict[str, Any]
    num_rows: int


def _part_of(block: Block, policy: BadDataPolicy) -> _Part:
    """Columns of a block: numbers as NumPy arrays, the rest as it lies in Arrow."""
    table = BlockAccessor.for_block(block).to_arrow()
    missing = {}
    for place, name in enumerate(table.column_names):
        column = table[name]
        if not column.null_count or not policy.looks_at(name):
            continue
        if pa.types.is_null(column.type):
            missing[name] = np.ones(len(column), dtype=bool)
        elif _is_plain_number(column.type):
            missing[name] = column.is_null().to_numpy()
            table = table.set_column(place, name, column.fill_null(False if pa.types.is_boolean(column.type) else 0))
    arrow = BlockAccessor.for_block(table)
    return _Part({name: _column(arrow, table[name], name) for name in table.column_names}, missing, table.num_rows)


def _column(block: "BlockAccessor[Any]", column: pa.ChunkedArray, name: str) -> Column:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))  # readers differ in the name that they give to its items
    kind = column.type
    if (_is_plain_number(kind) and not column.null_count) or isinstance(kind, pa.BaseExtensionType):
        return block.to_numpy(name)
    return column.combine_chunks()


def _is_plain_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _joined(parts: list[_Part], first_row: int) -> tuple[dict[str, Column], dict[str, Any]]:
    """The columns of successive parts in one piece, and their masks."""
    names = {name for part in parts for name in part.missing}
    models = {name: column for part in parts for name, column in part.columns.items() if _type_of(column) != _NOTHING}
    for part in parts:
        for name in part.missing.keys() & models.keys():
            if _type_of(part.columns[name]) == _NOTHING:
                part.columns[name] = _like(models[name], part.num_rows)
    begin = first_row + parts[0].num_rows
    for part in parts[1:]:
        _refuse_difference(_types(parts[0]), _types(part), f"the block from row {begin} on{_file_of(part)}")
        begin += part.num_rows
    columns = {name: _concatenated([part.columns[name] for part in parts]) for name in parts[0].columns}
    masks = {
        name: np.concatenate([part.missing.get(name, np.zeros(part.num_rows, dtype=bool)) for part in parts])
        for name in names
    }
    return columns, masks


def _like(column: Column, num_rows: int) -> Column:
    """A column of the same type in which nothing stands."""
    if isinstance(column, np.ndarray):
        return np.zeros((num_rows, *column.shape[1:]), column.dtype)
    return pa.nulls(num_rows, column.type)


def _file_of(part: _Part) -> str:
    """Of its first row, in words, if it is known."""
    path = path_of(part.columns.get("path"), 0)
    return "" if path is None else f" (file {path})"


def _with_paths(finding: Finding, columns: dict[str, Column], first_row: int) -> Finding:
    """Name the files where the reader was asked for them (``include_paths=True``)."""
    first_ones = [path_of(columns.get("path"), row) for row in (finding.rows[:_PATHS_KEPT] - first_row).tolist()]
    return finding._replace(paths=tuple(path for path in first_ones if path is not None))


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


def _types(part: _Part) -> dict[str, str]:
    return {name: _type_of(column) for name, column in part.columns.items()}


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
