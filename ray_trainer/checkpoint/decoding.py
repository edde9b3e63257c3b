"""State from its JSON and tensors, the way back of `encoding`. Nothing is imported, called or unpickled."""

import base64
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ray_trainer.checkpoint.encoding import NUMPY_DTYPE, Json, is_dense
from ray_trainer.errors import CheckpointCorruptError

_COMPLEX = ("complex128", "complex32")


def decode(tree: Json, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    """Put state together again; equal to what was encoded, types included.

    Raises:
        CheckpointCorruptError: `encode` did not write this.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        RecursionError,
    ) as error:
        if isinstance(error, CheckpointCorruptError):
            raise
        raise CheckpointCorruptError(f"The state can't be put together: {error!r}.") from error


class _Decoder:
    def __init__(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self._decoded: dict[str, torch.Tensor] = {}

    def decode(self, tree: Json) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), "")
        if not tag.startswith("$"):
            return {key: self.decode(value) for key, value in tree.items()}
        return self._tagged(tag, tree[tag], tree)

    def _tagged(self, tag: str, content: Json, node: dict[str, Json]) -> Any:
        match tag:
            case "$tuple":
                return tuple(self.decode(content))
            case "$dict":
                return dict(self._pairs(content))
            case "$counter":
                return Counter(dict(self._pairs(content)))
            case "$ordered":
                return self._ordered(content, node)
            case "$float":
                return float(content)
            case "$int":
                return int(content, 16)
            case "$bytes":
                return base64.b64decode(content, validate=True)
            case "$tensor":
                return self._tensor(content, node)
            case "$array":
                raw = self._stored(content).numpy()
                return raw.view(_numpy_dtype(node["dtype"])).reshape(node["shape"])
            case "$scalar":
                return np.frombuffer(bytes.fromhex(content), dtype=_numpy_dtype(node["dtype"]))[0]
        raise CheckpointCorruptError(f"The state holds {tag!r}, which this version does not know.")

    def _pairs(self, pairs: Json) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in pairs]

    def _ordered(self, pairs: Json, node: dict[str, Json]) -> OrderedDict[Any, Any]:
        mapping = OrderedDict(self._pairs(pairs))
        if "metadata" in node:
            mapping._metadata = self.decode(node["metadata"])  # type: ignore[attr-defined] # where torch keeps it
        return mapping

    def _tensor(self, reference: str, node: dict[str, Json]) -> torch.Tensor:
        if reference not in self._decoded:
            tensor = _retyped(self._stored(reference), node.get("dtype"))
            self._decoded[reference] = _restrided(tensor, node.get("stride"))
        return self._decoded[reference]

    def _stored(self, reference: str) -> torch.Tensor:
        file, _, name = reference.partition("/")
        return self._tensors[file][name]


def _retyped(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    if dtype is None:
        return tensor
    if dtype in _COMPLEX:
        return torch.view_as_complex(tensor)
    wanted = getattr(torch, dtype)
    if not isinstance(wanted, torch.dtype) or wanted.itemsize != 1:
        raise ValueError(f"{dtype} is no type of one byte")
    return tensor.view(wanted)


def _restrided(tensor: torch.Tensor, stride: list[int] | None) -> torch.Tensor:
    if stride is None:
        return tensor
    if not is_dense(tensor.shape, stride):
        raise ValueError(f"stride {stride} does not fill shape {list(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _numpy_dtype(text: str) -> np.dtype[Any]:
    if not NUMPY_DTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is no numpy type of numbers or times")
    return np.dtype(text)
