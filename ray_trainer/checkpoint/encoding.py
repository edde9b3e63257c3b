"""Nested plain state as JSON and tensors; `decoding` is the way back, exact and without pickle.

What JSON has is written as it is. The rest becomes an object with one key that begins with ``$``:

===============  ================================================================
``$dict``        pairs, for keys that are not strings or begin with ``$``
``$ordered``     pairs of an OrderedDict; ``metadata`` is that of a module's state
``$counter``     pairs of a Counter, which torch's MultiStepLR keeps
``$tuple``       items
``$float``       ``"nan"``, ``"inf"``, ``"-inf"``
``$int``         hexadecimal, beyond 64 bits
``$bytes``       base64
``$tensor``      ``file/name``; ``dtype`` and ``stride`` where the file can't tell
``$array``       ``file/name`` of a numpy array's bytes, ``dtype``, ``shape``
``$scalar``      hexadecimal bytes of a numpy scalar, ``dtype``
===============  ================================================================
"""

import base64
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ray_trainer.checkpoint.shards import is_sharded, local_part
from ray_trainer.checkpoint.tensors import STORABLE_DTYPES
from ray_trainer.errors import CheckpointError

Json = Any
StatePath = tuple[str, ...]

_MAX_DEPTH = 100
SHARDED_FILES = ("model", "optimizer")
NUMPY_DTYPE = re.compile(r"[<>|=][biufcmM]\d+(\[\w+\])?")


class Encoded(NamedTuple):
    """A state in two parts.

    Attributes:
        tree: its JSON.
        tensors: by file and then by name in that file; they share memory with the state.
        shards: likewise, those of which this rank has a part only.
    """

    tree: Json
    tensors: dict[str, dict[str, torch.Tensor]]
    shards: dict[str, dict[str, torch.Tensor]]


def encode(
    state: Any, path: StatePath = (), file_of: Callable[[StatePath], tuple[str, StatePath]] | None = None
) -> Encoded:
    """Take nested plain state apart.

    Tensors that are one and the same memory are stored once, and are one again when decoded.

    Args:
        state: None, bool, int, float, str, bytes, list, tuple, dict, numpy and tensors, nested.
        path: where it stands in the whole, for the error.
        file_of: the file for the tensor at a path, and the path within that file; default ``"trainer"``.

    Raises:
        CheckpointError: something else is in it; names its path.
    """
    encoder = _Encoder(file_of or (lambda path: ("trainer", path)))
    return Encoded(encoder.encode(state, path), encoder.tensors, encoder.shards)


def encode_plain(state: Any, path: StatePath) -> Json:
    """The JSON of state that holds no tensors, such as a configuration."""
    encoded = encode(state, path)
    if encoded.tensors:
        name = next(name for names in encoded.tensors.values() for name in names)
        raise CheckpointError(f"{name}: a tensor or array can't stand here; use a number or a list of numbers.")
    return encoded.tree


class _Encoder:
    def __init__(self, file_of: Callable[[StatePath], tuple[str, StatePath]]) -> None:
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.shards: dict[str, dict[str, torch.Tensor]] = {}
        self._file_of = file_of
        self._references: dict[tuple[Any, ...], Json] = {}

    def encode(self, value: Any, path: StatePath) -> Json:
        if len(path) > _MAX_DEPTH:
            raise _refusal(path, f"nested more than {_MAX_DEPTH} deep, or part of itself")
        kind = type(value)
        if kind in (type(None), bool, str):
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if kind is list:
            return self._items(value, path)
        if kind is tuple:
            return {"$tuple": self._items(value, path)}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        raise _refusal(path, kind.__name__)

    def _items(self, values: Iterable[Any], path: StatePath) -> list[Json]:
        return [self.encode(value, (*path, str(index))) for index, value in enumerate(values)]

    def _mapping(self, mapping: Mapping[Any, Any], path: StatePath) -> Json:
        if type(mapping) is dict and all(type(key) is str and key[:1] != "$" for key in mapping):
            return {key: self.encode(value, (*path, key)) for key, value in mapping.items()}
        pairs = [[self._key(key, path), self.encode(value, (*path, str(key)))] for key, value in mapping.items()]
        if type(mapping) is Counter:
            return {"$counter": pairs}
        if type(mapping) is OrderedDict:
            metadata = getattr(mapping, "_metadata", None)
            extra = {} if metadata is None else {"metadata": self.encode(metadata, (*path, "_metadata"))}
            return {"$ordered": pairs, **extra}
        return {"$dict": pairs}

    def _key(self, key: Any, path: StatePath) -> Json:
        items = key if type(key) is tuple else (key,)
        if any(type(item) not in (type(None), bool, int, float, str) for item in items):
            raise _refusal((*path, str(key)), f"a key of type {type(key).__name__}")
        return self.encode(key, path)

    def _tensor(self, tensor: torch.Tensor, path: StatePath) -> Json:
        if is_sharded(tensor):
            return self._shard(tensor.detach(), path)
        tensor = local_part(tensor)
        _check_tensor(tensor, path)
        tensor = tensor.detach()
        identity = _identity(tensor)
        if tensor.numel() and identity in self._references:
            return self._references[identity]
        node: dict[str, Json] = {}
        if tensor.dtype not in STORABLE_DTYPES:
            node["dtype"] = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
            node["stride"] = list(tensor.stride())
        node = {"$tensor": self._store(_storable(tensor, path), path), **node}
        self._references[identity] = node
        return node

    def _shard(self, tensor: torch.Tensor, path: StatePath) -> Json:
        """Refer to the whole, as if it were stored in one place; every rank gives it the same name."""
        _check_shard(tensor, self._file_of(path)[0], path)
        part = local_part(tensor)
        identity = _identity(part)
        if part.numel() and identity in self._references:
            return self._references[identity]
        node = {"$tensor": self._store(tensor, path, self.shards)}
        self._references[identity] = node
        return node

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, path: StatePath) -> Json:
        dtype = value.dtype.str
        if not NUMPY_DTYPE.fullmatch(dtype) or type(value) not in (np.ndarray, value.dtype.type):
            raise _refusal(path, f"numpy {type(value).__name__} of {value.dtype}")
        if isinstance(value, np.generic):
            return {"$scalar": value.tobytes().hex(), "dtype": dtype}
        content = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else _EMPTY
        return {"$array": self._store(content, path), "dtype": dtype, "shape": list(value.shape)}

    def _store(
        self, tensor: torch.Tensor, path: StatePath, into: dict[str, dict[str, torch.Tensor]] | None = None
    ) -> str:
        file, within = self._file_of(path)
        whole, sharded = self.tensors.get(file, {}), self.shards.get(file, {})
        name = wanted = ".".join(within)
        attempt = 1
        while name in whole or name in sharded or name == "__metadata__":  # {"a.b": ...} beside {"a": {"b": ...}}
            attempt += 1
            name = f"{wanted}#{attempt}"
        (self.tensors if into is None else into).setdefault(file, {})[name] = tensor
        return f"{file}/{name}"


_EMPTY = torch.empty(0, dtype=torch.uint8)


def _refusal(path: StatePath, what: str) -> CheckpointError:
    return CheckpointError(
        f"{'.'.join(path)}: {what} can't be stored in a checkpoint, which holds None, bool, int, float, str, "
        f"bytes, list, tuple, dict, numpy and tensors, and nothing that would have to be unpickled. "
        f"Return something plain in its place from state_dict()."
    )


def _check_tensor(tensor: torch.Tensor, path: StatePath) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise _refusal(path, f"tensor of type {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise _refusal(path, f"{'quantized' if tensor.is_quantized else tensor.layout} tensor")
    if tensor.is_meta:
        raise _refusal(path, "tensor on the meta device, which has no values,")


def _check_shard(tensor: torch.Tensor, file: str, path: StatePath) -> None:
    if file not in SHARDED_FILES:
        raise _refusal(path, "a sharded tensor, outside of model and optimizer,")
    if len(getattr(tensor, "placements", ())) != 1:
        raise _refusal(path, "a tensor that is sharded over more than one dimension of the mesh")
    _check_tensor(local_part(tensor), path)
    if tensor.dtype not in STORABLE_DTYPES:
        raise _refusal(path, f"sharded tensor of {tensor.dtype}")


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = (tensor.device, tensor.data_ptr())
    return (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _storable(tensor: torch.Tensor, path: StatePath) -> torch.Tensor:
    """The tensor, or a view of its bytes where safetensors has no name for its type."""
    if tensor.dtype in STORABLE_DTYPES:
        return tensor
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        return tensor.contiguous().view(torch.uint8)
    raise _refusal(path, f"tensor of {tensor.dtype}")


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these strides fill their memory without gap or overlap, as channels_last does."""
    expected = 1
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
