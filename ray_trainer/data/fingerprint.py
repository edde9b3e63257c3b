"""Telling datasets apart without reading all of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from ray_trainer.seeding import derive_seed

_SAMPLED_ROWS = 256
_HASHED_WHOLE_BYTES = 64 * 1024 * 1024


def fingerprint(*values: Any) -> str:
    """A hash of 128 bits over nested plain values, tensors and arrays, equal in every process.

    Of objects it does not know it takes the type only.
    """
    hasher = xxh3_128()
    for value in values:
        _feed(hasher, value)
    return hasher.hexdigest()


def sampled_rows(num_rows: int, limit: int = _SAMPLED_ROWS) -> list[int]:
    """Up to ``limit`` indices, always the same for a length; the first and the last are among them."""
    if num_rows <= limit:
        return list(range(num_rows))
    drawn = {derive_seed(num_rows, draw) % num_rows for draw in range(limit - 2)}
    return sorted(drawn | {0, num_rows - 1})


def tensor_fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash of type and shape, and of the content: whole up to 64 MB a tensor, else of sampled rows."""
    parts: list[Any] = []
    for tensor in tensors:
        whole = tensor.numel() * tensor.element_size() <= _HASHED_WHOLE_BYTES
        content = tensor if whole else tensor[torch.tensor(sampled_rows(len(tensor)), device=tensor.device)]
        parts += [tuple(tensor.shape), content]
    return fingerprint(*parts)


def _feed(hasher: xxh3_128, value: Any) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(hasher, value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        hasher.update(f"array {value.dtype.str} {value.shape}".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, (bytes, str)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        hasher.update(f"{type(value).__name__} {len(data)} ".encode())
        hasher.update(data)
    elif value is None or isinstance(value, (bool, int, float, complex, np.generic)):
        hasher.update(f"{type(value).__name__} {value!r} ".encode())
    elif isinstance(value, Mapping):
        hasher.update(f"dict {len(value)} ".encode())
        for key in value:
            _feed(hasher, key)
            _feed(hasher, value[key])
    elif isinstance(value, (list, tuple, np.ndarray)):
        hasher.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"object {type(value).__module__}.{type(value).__qualname__} ".encode())


def _feed_tensor(hasher: xxh3_128, tensor: Tensor) -> None:
    hasher.update(f"tensor {tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
    if tensor.layout is torch.strided and not tensor.is_quantized:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            hasher.update(plain.view(torch.uint8).numpy().tobytes())
