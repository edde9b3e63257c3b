"""Fully sharded data parallelism: the model itself, dealt out over the ranks with torch's ``fully_shard``.

Each rank keeps a part of every parameter, its gradient and its optimizer state (FSDP2; Zhao et al. 2023,
arXiv:2304.11277, Rajbhandari et al. 2020, arXiv:1910.02054, stage 3). Names and the order of parameters stay
what they were. What is imported from torch here is slow to import, and is so only where it is used.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ray_trainer.config import TrainingConfig
from ray_trainer.distributed import gather_objects, gather_rows, world_size
from ray_trainer.errors import ConfigError

logger = logging.getLogger(__name__)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)
_BUCKET_BYTES = 250 * 2**20


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` dealt it out."""
    return hasattr(model, "set_requires_gradient_sync")


def shard_model(model: nn.Module, device: torch.device, config: TrainingConfig) -> None:
    """Deal a model out over all ranks, in place, as rank 0 has it; it ends up on the device. Collective.

    Each block of `blocks_of` is gathered for its own forward and backward pass and let go of afterwards; what
    is in no block is kept whole from the forward to the end of the backward pass. In mixed precision blocks
    are gathered and computed in the low one, and gradients are reduced in float32, of normalisation layers
    with running statistics computed in it as well.

    Raises:
        ConfigError: the model cannot be sharded; on all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _refuse_unshardable(model)
    _follow_rank_zero([*model.parameters(), *model.buffers()])
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    blocks = blocks_of(model)
    if config.autocast_dtype:
        policy = MixedPrecisionPolicy(getattr(torch, config.autocast_dtype), reduce_dtype=torch.float32)
        for layer in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]:
            if layer is not model and any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
                blocks = [block for block in blocks if block is not layer]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    logger.info("%s is sharded over %d workers in %d blocks.", type(model).__name__, world_size(), len(blocks))
    fully_shard(model, mesh=mesh, mp_policy=policy)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time, inner ones first.

    In this order of preference: what the model's method ``fsdp_modules()`` returns; modules of the classes that
    its ``_no_split_modules`` names, as models of Hugging Face do; modules that a ``ModuleList``,
    ``ModuleDict`` or ``Sequential`` holds several of the same class of. Those that share a parameter with the
    rest of the model are left out.

    Raises:
        ConfigError: ``fsdp_modules`` returns something else than modules of the model.
    """
    chosen = _named_by_the_model(model) or _repeated(model)
    places = {id(module): place for place, module in enumerate(model.modules())}
    if any(id(module) not in places for module in chosen):
        raise ConfigError(
            f"{type(model).__name__}.fsdp_modules() returns something that is no module of the model. Return the "
            "modules that are to be gathered one at a time, such as list(self.layers)."
        )
    uses = _uses(model)
    alone = [module for module in chosen if module is not model and _uses(module).items() <= uses.items()]
    return sorted({id(module): module for module in alone}.values(), key=lambda module: -places[id(module)])


def rebind(optimizer: torch.optim.Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]) -> None:
    """Let an optimizer that was built from a model's parameters go on with those that took their places."""
    successor = dict(zip(map(id, before), after, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [successor[id(parameter)] for parameter in group["params"]]
    states = {successor[id(parameter)]: state for parameter, state in optimizer.state.items()}
    optimizer.state.clear()
    for parameter, state in states.items():
        optimizer.state[parameter] = {name: dealt_out(value, parameter) for name, value in state.items()}


def dealt_out(value: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor, or a part already cut, as the ``DTensor`` that ``like`` is.

    What has neither its shape nor that of its part on this rank is returned as it is.
    """
    if not hasattr(like, "placements") or not isinstance(value, Tensor) or hasattr(value, "placements"):
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    offsets, lengths = share_of(like)
    if value.shape == like.shape:
        value = value[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]
    elif tuple(value.shape) != lengths:
        return value
    mine = value.detach().to(like.to_local().device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def share_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a ``DTensor`` begins in the whole, and how far it goes, by dimension."""
    (chunk,) = cast(Any, tensor).__create_chunk_list__()  # what DTensor offers to checkpoints
    return tuple(chunk.offsets), tuple(chunk.sizes)


def set_gradient_sync(model: nn.Module, is_on: bool) -> None:
    """Whether the next backward pass exchanges gradients, or adds them up on this rank."""
    cast(Any, model).set_requires_gradient_sync(is_on)


def forget_broken_step(model: nn.Module) -> None:
    """Make the model usable again after an error in the middle of a pass, where torch can (from 2.13)."""
    reset: Callable[[], None] | None = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()


def most_of_all_ranks(count: int) -> int:
    """The largest of the ranks' counts. Collective."""
    return int(gather_rows(torch.tensor([[count]], dtype=torch.float64)).max())


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, as ``DistributedDataParallel`` does. Collective."""
    _follow_rank_zero(model.buffers())


def _follow_rank_zero(tensors: Iterable[Tensor]) -> None:
    flat = [tensor.detach() for tensor in tensors if tensor.numel()]
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in flat]
    if real:
        assert dist.group.WORLD is not None
        # what DistributedDataParallel calls; it has no public name
        dist._broadcast_coalesced(dist.group.WORLD, real, _BUCKET_BYTES, 0)  # type: ignore[attr-defined]


def _named_by_the_model(model: nn.Module) -> list[nn.Module]:
    own = getattr(model, "fsdp_modules", None)
    if own is not None:
        return list(own if isinstance(own, Iterable) else own())
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _repeated(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    found: list[nn.Module] = []
    if isinstance(module, _CONTAINERS):
        able = [child for child in children if not isinstance(child, _WITHOUT_FORWARD) and _uses(child)]
        kinds = Counter(type(child) for child in able)
        found = [child for child in able if kinds[type(child)] > 1]
    taken = {id(child) for child in found}
    return found + [block for child in children if id(child) not in taken for block in _repeated(child)]


def _uses(module: nn.Module) -> dict[int, int]:
    """How often each parameter occurs in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _refuse_unshardable(model: nn.Module) -> None:
    problems = []
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        problems.append("it is sharded already; build it whole")
    if scalars := [name for name, parameter in model.named_parameters() if parameter.dim() == 0]:
        problems.append(f"{', '.join(scalars)} has no dimension to cut; make it one of shape (1,)")
    if sparse := [name for name, module in model.named_modules() if getattr(module, "sparse", False)]:
        problems.append(f"{', '.join(sparse)} has sparse gradients, which are not reduced; build it with sparse=False")
    named = (*model.named_parameters(), *model.named_buffers())
    forms = gather_objects([(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named])
    if different := [rank for rank, form in enumerate(forms) if form != forms[0]]:
        problems.append(f"that of rank {different[0]} has other parameters than that of rank 0; build the same one")
    if problems:
        error = ConfigError(f"parallelism = 'fsdp': {type(model).__name__} can't be sharded: {'; '.join(problems)}.")
        error.on_all_ranks = True
        raise error
