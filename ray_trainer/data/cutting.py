"""Processing a batch in several pieces, one after the other, because it needs too much memory as a whole."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

from torch import Tensor

from ray_trainer.data.batch import Batch, count_samples


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """A batch in pieces of as equal numbers of samples as possible; fewer where it has fewer samples.

    Tensors, arrays and lists with an entry for each sample are cut, at any depth; anything else is in all pieces.
    """
    if pieces == 1:
        return [batch]
    count = count_samples(batch)
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    ranges = [(start, end) for start, end in pairwise(edges) if start < end]
    return [cast(Batch, _part(batch, count, start, end)) for start, end in ranges]


def _part(value: Any, count: int, start: int, end: int) -> Any:
    shape = getattr(value, "shape", None)
    if isinstance(value, Tensor) or shape is not None:
        return value[start:end] if shape and shape[0] == count else value
    if isinstance(value, Mapping):
        return {name: _part(item, count, start, end) for name, item in value.items()}
    if isinstance(value, list) and len(value) == count and not any(hasattr(item, "shape") for item in value):
        return value[start:end]
    if isinstance(value, list | tuple):
        items = [_part(item, count, start, end) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
