"""The few collectives that training needs; on one process they cost nothing.

Everything goes through the default process group of ``torch.distributed``, which must be able to move
CPU tensors (``gloo``, or ``cpu:gloo,cuda:nccl`` on GPUs).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import distributed as dist
from torch import nn

from ray_trainer import pulse
from ray_trainer.errors import RayTrainerError, RunError

T = TypeVar("T")

#: How gloo words it that another rank has gone, or does not answer any more.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "connectFullMesh",
    "gloo/transport",
)
_GROUP_IS_GONE = "The process group is gone: this worker is being ended because another one has failed."
#: How torch words that.
_NO_GROUP = "process group has not been initialized"
_CHUNK_BYTES = 64 << 20
_NAMES = ("forward_sync_buffers", "broadcast_buffers")  # before torch 2.13 it has only the second name
_BUFFERS_OPTION = next(name for name in _NAMES if name in signature(nn.parallel.DistributedDataParallel).parameters)


class RegroupError(RuntimeError):
    """The ranks leave their group between two steps, all after the same one, to form one with those that wait."""


class _Place(NamedTuple):
    rank: int
    world_size: int


_place: _Place | None = None


def world_size() -> int:
    """How many processes train together.

    Raises:
        RunError: in `membership`, when the process group is gone.
    """
    if _place is None:
        return dist.get_world_size() if _has_group() else 1
    if _place.world_size > 1 and not _has_group():
        raise RunError(_GROUP_IS_GONE)
    return _place.world_size


def rank() -> int:
    """This process among them, from 0."""
    if _place is None:
        return dist.get_rank() if _has_group() else 0
    return _place.rank


@contextmanager
def membership() -> Iterator[None]:
    """Inside, this process stays the rank that it is, whatever becomes of the process group.

    Ray leaves the group of a worker that it is about to end, in another thread. A worker that took itself for alone
    then would go on with its part of the data, and save what comes of it.
    """
    global _place
    outer = _place
    _place = outer or _Place(rank(), world_size())
    try:
        yield
    finally:
        _place = outer


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def set_patience(seconds: float) -> None:
    """How long a collective waits for the other ranks from now on."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def patience_s() -> float:
    """How long a collective waits for the other ranks; for ever where there is no process group."""
    if not _has_group():
        return math.inf
    group = dist.distributed_c10d._get_default_group()
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def barrier() -> None:
    """Wait until all ranks are here. Collective."""
    if world_size() > 1:
        gather_rows(torch.zeros(1, 1, dtype=torch.float64))


def gather_objects(value: T) -> list[T]:
    """The plain value of every rank, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with pulse.during(pulse.Phase.EXCHANGE):
        dist.all_gather_object(gathered, value)
    return cast(list[T], gathered)


def broadcast_object(value: T, source: int = 0) -> T:
    """The plain value of rank ``source``, on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value if rank() == source else None]
    with pulse.during(pulse.Phase.EXCHANGE):
        dist.broadcast_object_list(box, src=source)
    return cast(T, box[0])


def broadcast_all(tensors: Sequence[torch.Tensor], source: int) -> None:
    """Overwrite tensors with those of rank ``source``. Collective if there are any, with one exchange a type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        with pulse.during(pulse.Phase.EXCHANGE):
            dist.broadcast(flat.view(torch.uint8), source)  # whatever the type
        if rank() != source:
            parts = torch.split(flat, [tensor.numel() for tensor in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))


def broadcast_bytes(memory: torch.Tensor, source: int) -> None:
    """Fill CPU memory with that of rank ``source``. Collective: all ranks pass the same size.

    Args:
        memory: ``(size_bytes,)`` of uint8.
        source: whose content it is; not changed there.
    """
    if world_size() > 1:
        for chunk in torch.split(memory, _CHUNK_BYTES):
            with pulse.during(pulse.Phase.EXCHANGE):
                dist.broadcast(chunk, source)


def has_lost_peer(error: BaseException | None) -> bool:
    """Whether an error says that a collective failed because of another rank, which is gone or hangs."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST_PEER):
            return True
        error = error.__cause__
    return False


def ends_generation(error: BaseException) -> bool:
    """Whether the ranks that are left have nothing wrong, and are to form another group."""
    return isinstance(error, RegroupError) or has_lost_peer(error)


def blames_another(message: str) -> bool:
    """Whether an error with this message is what one rank gets to see of the failure of another."""
    return any(mark in message for mark in (*_LOST_PEER, _GROUP_IS_GONE, _NO_GROUP))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The float64 CPU rows of every rank. Collective: all ranks pass the same shape.

    Sums over the result are taken in rank order by the caller, so they do not depend on how a reduction
    algorithm happens to cut its buffer into chunks.

    Args:
        rows: ``(n, k)``.

    Returns:
        ``(world_size, n, k)``.
    """
    if world_size() == 1:
        return rows.unsqueeze(0)
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    before = pulse.beat(pulse.Phase.EXCHANGE)
    try:
        dist.all_gather(gathered, rows.contiguous())
    finally:
        pulse.beat(before)
    return torch.stack(gathered)


def gather_into(gathered: list[torch.Tensor], tensor: torch.Tensor) -> None:
    """Overwrite tensors with those of the ranks, in their order. Collective: shape and type are equal on all ranks."""
    with pulse.during(pulse.Phase.EXCHANGE):
        dist.all_gather(gathered, tensor)


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Let all ranks raise what the first failing one raised in the block. Collective at its end.

    The block itself must not communicate: a rank that fails in it would leave the others waiting.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, the other ranks must learn of it before it is raised
        error = caught
    failures = gather_objects(None if error is None else _portable(error))
    first = next((failure for failure in failures if failure is not None), None)
    if first is None:
        return
    raised = error if error is not None and rank() == failures.index(first) else first
    if isinstance(raised, RayTrainerError):
        raised.on_all_ranks = True
    raise raised


def _portable(error: Exception) -> RayTrainerError:
    """The error in a form that surely pickles."""
    if isinstance(error, RayTrainerError):
        return error
    return RunError(f"rank {rank()}: {type(error).__name__}: {error}")


def share_model(model: nn.Module) -> None:
    """Let all ranks begin with the parameters and buffers of rank 0. Collective."""
    if world_size() > 1:
        broadcast_all([*model.parameters(), *model.buffers()], source=0)


def wrap_model(model: nn.Module, device: torch.device, broadcasts_buffers: bool = True) -> nn.Module:
    """The module to call in training: ``model`` itself, or in ``DistributedDataParallel`` on several ranks.

    The optimizer, checkpoints and validation keep using ``model``, whose names carry no prefix.

    Args:
        model: already on its device.
        device: of this process.
        broadcasts_buffers: each step begins with the buffers of rank 0; False where somebody else sees to that.
    """
    if world_size() == 1:
        return model
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {} if broadcasts_buffers else {_BUFFERS_OPTION: False}
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if on_gpu else None, **options)
