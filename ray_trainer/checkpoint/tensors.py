"""The safetensors format: tensors of a file as pieces to write, and a file's bytes as tensors.

The format is an eight-byte length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). It is written here rather than by the safetensors
package because that one builds the whole file in memory, twice; what is written loads with it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ray_trainer.checkpoint.images import FileImage
from ray_trainer.errors import CheckpointCorruptError

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}
_NAME_OF: dict[torch.dtype, str] = {getattr(torch, name): code for name, code in _NAMES.items()}
_DTYPE_OF = {code: dtype for dtype, code in _NAME_OF.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

STORABLE_DTYPES = frozenset(_NAME_OF)


def tensor_image(name: str, tensors: Mapping[str, torch.Tensor]) -> FileImage:
    """A safetensors file of tensors of `STORABLE_DTYPES`, on any device; values are read when they are written."""
    by_alignment = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in by_alignment:
        begin, end = end, end + tensor.nbytes
        entries[key] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    return FileImage(name, (head, *(tensor for _, tensor in by_alignment)))


def read_tensors(blocks: Iterable[bytes | memoryview], size_bytes: int, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each in memory of its own, filled as the bytes arrive.

    Args:
        blocks: the content of the whole file.
        size_bytes: of the whole file; nothing larger is ever allocated.
        name: of the file, for the error.

    Raises:
        CheckpointCorruptError: these are not the bytes of a safetensors file.
    """
    stream = _Stream(blocks)
    try:
        header = _read_header(stream, size_bytes)
        tensors = {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[key] = _read_tensor(stream, entry)
        stream.finish(size_bytes)
        return {key: tensors[key] for key in header}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{name} is not a safetensors file: {error}") from error


class _Stream:
    """Blocks of bytes, taken in other portions than they come in."""

    def __init__(self, blocks: Iterable[bytes | memoryview]) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")
        self.position = 0

    def read_into(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            if not self._rest:
                block = next(self._blocks, b"")
                if not block:
                    raise ValueError("it ends early")
                self._rest = memoryview(block)
            part = self._rest[: len(target) - filled]
            target[filled : filled + len(part)] = part
            self._rest = self._rest[len(part) :]
            filled += len(part)
        self.position += filled

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def finish(self, size: int) -> None:
        """Take what is left, which has to be nothing."""
        left = len(self._rest) + len(next(self._blocks, b""))
        if left or self.position != size:
            raise ValueError(f"{self.position} of its {size} bytes belong to tensors")


def _read_header(stream: _Stream, size_bytes: int) -> dict[str, Any]:
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(size_bytes - 8, _MAX_HEADER_BYTES):
        raise ValueError("its header does not fit")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, after = entry["data_offsets"]
        if begin != end or after < begin:
            raise ValueError(f"{entry} leaves a gap or an overlap")
        end = after
    if 8 + length + end != size_bytes:
        raise ValueError(f"its tensors have {end} bytes")
    return dict(header)


def _read_tensor(stream: _Stream, entry: dict[str, Any]) -> torch.Tensor:
    dtype, shape = _DTYPE_OF[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(length < 0 for length in shape) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} does not fill its bytes")
    values = torch.empty(end - begin, dtype=torch.uint8)
    stream.read_into(values.numpy().data)
    return values.view(dtype).reshape(shape)
