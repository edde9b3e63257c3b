"""Who writes which part of what is equal on all ranks: each rank a stripe, so that all of them write at once.

The model stays one file of rank 0, under the model's own names, for whoever reads it without this package. The
optimizer's tensors, which are twice as large with Adam, are divided so that each rank writes about the same.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import xxhash

MIN_STRIPED_BYTES = 4 << 20  # less is not worth more files

Tensors = Mapping[str, torch.Tensor]


class Stripe(NamedTuple):
    """A place among the ranks that write the same state.

    Attributes:
        rank: that writes.
        world_size: how many write it.
    """

    rank: int = 0
    world_size: int = 1


ALONE = Stripe()


def divide(tensors: Tensors, written_by_first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Divide tensors into a run of neighbours for each rank, by their bytes; equal on all ranks.

    Args:
        tensors: by name.
        written_by_first: bytes of other files of the first rank, for which it gets less.
        count: of ranks.

    Returns:
        ``count`` parts, some of which may be empty.
    """
    total = size_bytes(tensors)
    if count == 1 or total < MIN_STRIPED_BYTES:
        return [dict(tensors), *({} for _ in range(count - 1))]
    share = (written_by_first + total) / count
    begin = float(written_by_first)
    if written_by_first >= share:  # the first rank has enough to do
        share = begin = total / (count - 1)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    sizes = [tensor.nbytes for tensor in tensors.values()]
    starts = itertools.accumulate(sizes[:-1], initial=begin)
    for (name, tensor), size, start in zip(tensors.items(), sizes, starts, strict=True):
        parts[min(int((start + size / 2) / share), count - 1)][name] = tensor
    return parts


def size_bytes(tensors: Tensors) -> int:
    """Of all of them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def digest(parts: Sequence[Tensors]) -> str:
    """Of names and shapes: ranks that divide in different ways would leave a gap between their stripes."""
    plan = [[(name, list(tensor.shape)) for name, tensor in part.items()] for part in parts]
    return xxhash.xxh3_64_hexdigest(json.dumps(plan).encode())
