"""What a source hands to the loop, and the plan by which samples are dealt out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ray_trainer.errors import ConfigError, DataError

Batch = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


class StepBatch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        micro_batches: in order, each of at most ``batch_size`` samples; never empty.
        num_samples: samples that count. 0 where there are fewer samples than ranks: one stand-in batch is
            given then, so that the rank takes part in the step, and it has to count with weight zero.
        places: of each micro-batch in the global batch, from 0; told where micro-batches are dealt out whole.
    """

    micro_batches: list[Batch]
    num_samples: int
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchPlan:
    """Who takes which samples, and when.

    Attributes:
        batch_size: samples a rank processes at once, the micro-batch.
        global_batch_size: samples of one step over all ranks; fixed for a run, whatever the number of ranks.
        rank: of this process.
        world_size: number of ranks.
        seed: of the run.
        shuffle: False keeps the order of the dataset.
        drop_last: leave out the samples that do not fill the last global batch.
        num_loader_workers: processes that read ahead, where reading in processes pays.
        limit_batches: at most so many micro-batches a rank in an epoch; None reads everything.
        deals_whole: cut the global batch into micro-batches first and deal those out, so that each is the same
            whatever the number of ranks; else a rank cuts its own part.
    """

    batch_size: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 42
    shuffle: bool = True
    drop_last: bool = False
    num_loader_workers: int = 0
    limit_batches: int | None = None
    deals_whole: bool = False

    @property
    def micro_batches_a_step(self) -> int:
        """Of the rank that has most of them, in a full step."""
        return -(-self.global_batch_size // (self.batch_size * self.world_size))

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "global_batch_size": 1, "world_size": 1, "num_loader_workers": 0}
        if self.limit_batches is not None:
            at_least["limit_batches"] = 1
        given = {name: getattr(self, name) for name in at_least}
        errors = [
            f"{name} is {given[name]}; it must be at least {least}."
            for name, least in at_least.items()
            if given[name] < least
        ]
        if not errors and not 0 <= self.rank < self.world_size:
            errors = [f"rank is {self.rank}; it must be in 0..{self.world_size - 1}, one of world_size ranks."]
        if errors:
            raise ConfigError("\n".join(errors))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch, at any depth; anything else stays as it is."""
    if device.type == "cpu":
        return batch
    return cast(Batch, _moved(batch, device))


def count_samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor or array found, else of the first list.

    Raises:
        DataError: nothing in the batch has a length.
    """
    length = _array_length(batch)
    if length is not None:
        return length
    candidates = [batch, *batch.values()] if isinstance(batch, Mapping) else [batch]
    for candidate in candidates:
        if isinstance(candidate, list) and candidate:
            return len(candidate)
    raise DataError(
        f"A batch of type {type(batch).__name__} has no dimension to count samples by. "
        "Let the loader return a tensor, or a tuple or dict with one in it."
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.to(device) if hasattr(value, "to") else value


def _array_length(value: Any) -> int | None:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((length for part in parts if (length := _array_length(part)) is not None), None)
