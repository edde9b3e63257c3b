"""Tensors that are spread over the ranks: what each rank stores of them, and what any rank reads of that.

Rank 1 of a sharded run writes its pieces to ``model.shard00001.safetensors`` and
``optimizer.shard00001.safetensors``, under the names that the whole tensors have in ``model.safetensors`` and
``optimizer.safetensors``, and to ``shard00001.json`` where each piece begins in its whole. So the pieces of a
tensor, whoever reads them and however many ranks there are then, are those of all tables together.

Which regions to copy from which piece is worked out by torch's distributed checkpoint (DCP), from its own
metadata classes (``create_read_items_for_chunk_list``). Its storage layer is not used: the ``.metadata`` that
it writes is a pickle, its safetensors writer takes tensors alone, and both open files themselves, where ours are
copied into memory first, hashed on their way and declared whole by a manifest. The table is JSON that each rank
writes without asking the others, so saving needs no exchange that an unsharded checkpoint would not need.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from ray_trainer.errors import CheckpointCorruptError

Json = Any
Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Part of a tensor: where it begins, and how far it goes, by dimension."""

Share = Callable[[str, str, tuple[int, ...]], Region | None]
"""Takes file, name and shape of a tensor; tells the part that is needed, None for all."""

Pieces = dict[str, dict[str, torch.Tensor]]
"""Tensors by file and name, as in `encoding.Encoded`."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether other ranks have other parts of it; without importing ``DTensor``, which is slow."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a ``DTensor``; any other tensor as it is."""
    return cast(torch.Tensor, cast(Any, tensor).to_local()) if hasattr(tensor, "placements") else tensor


def pieces_and_table(sharded: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[Pieces, Json]:
    """This rank's pieces of sharded tensors, by file and name, and the table of them."""
    pieces: Pieces = {}
    table: dict[str, dict[str, Json]] = {}
    for file, tensors in sharded.items():
        for name, tensor in tensors.items():
            (chunk,) = cast(Any, tensor).__create_chunk_list__()  # what DTensor offers to DCP
            if 0 in chunk.sizes and any(chunk.offsets):
                continue  # more ranks than rows: this one has none
            pieces.setdefault(file, {})[name] = local_part(tensor.detach())
            table.setdefault(file, {})[name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offsets": list(chunk.offsets),
                "lengths": list(chunk.sizes),
            }
    return pieces, table


class _Copy(NamedTuple):
    """From which part of a piece to which part of what is put together."""

    name: str
    source: tuple[slice, ...]
    target: tuple[slice, ...]


@dataclass(frozen=True)
class _Piece:
    rank: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


class ShardReader:
    """Puts together what one rank needs of sharded tensors.

    Attributes:
        files: the pieces to read, as (rank, file); others hold nothing that is needed.
    """

    def __init__(self, tables: Mapping[int, Json], wanted_files: Iterable[str], share: Share | None) -> None:
        """Plan.

        Args:
            tables: of each rank that saved.
            wanted_files: ``model`` or ``optimizer``, or both.
            share: what is needed of each tensor; None for all of it.

        Raises:
            CheckpointCorruptError: the tables do not tell where every value of every tensor is.
        """
        self._targets: Pieces = {}
        self._copies: dict[tuple[int, str], list[_Copy]] = {}
        try:
            for file in wanted_files:
                for name, entries in _by_name(tables, file).items():
                    self._plan(file, name, entries, share)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointCorruptError(f"The tables of shards can't be used: {error!r}.") from error
        self.files = sorted(self._copies)

    def take(self, rank: int, file: str, pieces: Mapping[str, torch.Tensor]) -> None:
        """Copy what is needed of the pieces that a rank wrote.

        Raises:
            CheckpointCorruptError: they are not what the table says.
        """
        try:
            for copy in self._copies[rank, file]:
                target, source = self._targets[file][copy.name][copy.target], pieces[copy.name][copy.source]
                if (source.shape, source.dtype) != (target.shape, target.dtype):
                    raise ValueError(f"{copy.name} is smaller, or of another type")
                target.copy_(source)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointCorruptError(
                f"The pieces of rank {rank} of {file} are not those of its table: {error!r}."
            ) from error

    def tensors(self) -> Pieces:
        """All of them, or this rank's parts, once every file was taken."""
        return self._targets

    def _plan(self, file: str, name: str, entries: dict[int, Json], share: Share | None) -> None:
        first = next(iter(entries.values()))
        shape = tuple(int(length) for length in first["shape"])
        dtype = getattr(torch, first["dtype"])
        pieces = [_piece(rank, entry, first, shape) for rank, entry in entries.items()]
        if sum(math.prod(piece.lengths) for piece in pieces) != math.prod(shape):
            raise ValueError(f"pieces of {file}/{name} are missing")
        needed = share and share(file, name, shape)
        offsets, lengths = needed or ((0,) * len(shape), shape)
        self._targets.setdefault(file, {})[name] = torch.empty(lengths, dtype=dtype)
        for rank, source, target in _copies(name, dtype, shape, pieces, (offsets, lengths)):
            self._copies.setdefault((rank, file), []).append(_Copy(name, source, target))


def _by_name(tables: Mapping[int, Json], file: str) -> dict[str, dict[int, Json]]:
    """Turn tables by rank into entries by tensor and rank."""
    entries: dict[str, dict[int, Json]] = {}
    for rank, table in sorted(tables.items()):
        for name, entry in table.get(file, {}).items():
            entries.setdefault(name, {})[rank] = entry
    return entries


def _piece(rank: int, entry: Json, first: Json, shape: tuple[int, ...]) -> _Piece:
    piece = _Piece(rank, tuple(entry["offsets"]), tuple(entry["lengths"]))
    if (entry["shape"], entry["dtype"]) != (first["shape"], first["dtype"]):
        raise ValueError(f"rank {rank} has a piece of another tensor")
    for start, length, end in zip(piece.offsets, piece.lengths, shape, strict=True):
        if not 0 <= start <= start + length <= end:
            raise ValueError(f"a piece of rank {rank} lies outside its tensor")
    return piece


def _copies(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    pieces: list[_Piece],
    needed: Region,
) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
    """What to copy: the rank that has it, where in its piece it is, where in the needed part it goes."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    def chunk(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))

    filled = [piece for piece in pieces if math.prod(piece.lengths)]
    if not filled or not math.prod(needed[1]):
        return []
    saved = TensorStorageMetadata(
        TensorProperties(dtype), torch.Size(shape), [chunk(piece.offsets, piece.lengths) for piece in filled]
    )
    items = create_read_items_for_chunk_list(name, saved, [chunk(*needed)])
    return [
        (
            filled[cast(int, item.storage_index.index)].rank,
            _slices(item.storage_offsets, item.lengths),
            _slices(item.dest_offsets, item.lengths),
        )
        for item in items
    ]


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
