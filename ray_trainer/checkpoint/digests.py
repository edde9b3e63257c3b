"""Digests of the tensors in a state, to find out whether two of them are the same."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor


def tensors_in(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested state, each with its place, such as ``optimizer.state.0.exp_avg``."""
    if isinstance(state, Tensor):
        yield name, state
        return
    items = state.items() if isinstance(state, Mapping) else ()
    if isinstance(state, list | tuple):
        items = enumerate(state)  # type: ignore[assignment]  # keys of either kind make a place
    for key, value in items:
        yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """64 bits for each tensor that depend on each of its bits; equal for equal bytes on the same kind of device.

    On the CPU xxh3; elsewhere the sum of the bytes as integers, which stays on the device, so that all of it
    costs one wait. A sum does not tell what has only changed places.
    """
    found = {name: _hash(tensor) for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    elsewhere = {name: _sum(tensor) for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    if elsewhere:
        found |= dict(zip(elsewhere, torch.stack(list(elsewhere.values())).tolist(), strict=True))
    return {name: found[name] for name in tensors}


def joint_digest(parts: Mapping[str, int]) -> tuple[float, ...]:
    """128 bits for named digests together, as four whole numbers that a float holds exactly."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(parts.items()))
    whole = xxhash.xxh3_128_intdigest(text.encode())
    return tuple(float(whole >> shift & 0xFFFFFFFF) for shift in (0, 32, 64, 96))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat, of uint8; shares its memory where that is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _hash(tensor: Tensor) -> int:
    return xxhash.xxh3_64_intdigest(as_bytes(tensor).numpy().data) if tensor.numel() else 0


def _sum(tensor: Tensor) -> Tensor:
    flat = as_bytes(tensor)
    return (flat.view(torch.int64) if flat.numel() % 8 == 0 else flat).sum(dtype=torch.int64)
