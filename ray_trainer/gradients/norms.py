"""One norm over, and one factor for, all gradients: in as few kernels as their kinds allow."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

Kind = tuple[type[Tensor], torch.device, torch.dtype]
GradientGroups = dict[Kind, list[Tensor]]
"""Gradients that one kernel can take together."""


def group_gradients(parameters: Iterable[nn.Parameter]) -> GradientGroups:
    """The gradients that a backward pass has left; of sparse ones the values, each row once."""
    groups: GradientGroups = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            parameter.grad = gradient.coalesce()
            gradient = parameter.grad._values()
        groups.setdefault((type(gradient), gradient.device, gradient.dtype), []).append(gradient)
    return groups


def total_norm(groups: GradientGroups) -> Tensor:
    """The L2 norm of all gradients as one vector: zero-dim, on the first one's device; zero without any.

    Unlike torch's ``get_total_norm`` it adds up half-precision gradients in float32, takes sparse ones, and
    returns the global value of sharded ones (``DTensor``), for which it is **collective**.
    """
    if not groups:
        return torch.zeros(())
    norms = [_group_norm(dtype, gradients) for (_, _, dtype), gradients in groups.items()]
    if len(norms) == 1:
        return norms[0]
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return _joint([norm.to(norms[0].device, widest) for norm in norms])


def scale_gradients(groups: GradientGroups, factor: float) -> None:
    """Multiply all gradients in place; a factor of exactly one touches nothing."""
    if factor == 1.0:
        return
    for (tensor_type, device, dtype), gradients in groups.items():
        # On the CPU torch vectorises over the list only if the factor is a tensor of the same type. In half
        # precision that would round the factor.
        is_plain = tensor_type is Tensor and device.type == "cpu" and dtype in (torch.float32, torch.float64)
        torch._foreach_mul_(gradients, torch.scalar_tensor(factor, dtype=dtype) if is_plain else factor)


def whole(tensor: Tensor) -> Tensor:
    """The global value of a ``DTensor``, without importing its package for those who have none."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else cast(Tensor, full_tensor())


def _group_norm(dtype: torch.dtype, gradients: list[Tensor]) -> Tensor:
    sum_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
    return whole(_joint(torch._foreach_norm(gradients, 2.0, dtype=sum_dtype)))


def _joint(norms: Sequence[Tensor]) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(list(norms))))
