"""The safetensors format: tensors of a file as pieces to write, and a file's bytes as tensors.

The format is an eight-byte length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). It is written here rather than by the safetensors
package because that one builds the whole file in memory, twice; what is written loads with it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

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


class TensorFile:
    """A safetensors file that is yet to be written.

    Attributes:
        size_bytes: of the whole file.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lay out tensors of `STORABLE_DTYPES`, on any device; values are read when they are written."""
        by_alignment = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        self._tensors = [tensor for _, tensor in by_alignment]
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in by_alignment:
            begin, end = end, end + tensor.numel() * tensor.element_size()
            entries[name] = {
                "dtype": _NAME_OF[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._head = len(header).to_bytes(8, "little") + header
        self.size_bytes = len(self._head) + end

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The content, piece by piece; a tensor off the CPU or not contiguous is copied in its turn."""
        yield self._head
        for tensor in self._tensors:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().data


def read_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each in memory of its own.

    Args:
        data: the whole file.
        name: of the file, for the error.

    Raises:
        CheckpointCorruptError: these are not the bytes of a safetensors file.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if not 8 < start <= min(len(data), _MAX_HEADER_BYTES):
            raise ValueError("its header does not fit")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        content = memoryview(data)[start:]
        return {key: _tensor(entry, content) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{name} is not a safetensors file: {error}.") from error


def _tensor(entry: dict[str, Any], content: memoryview) -> torch.Tensor:
    dtype, shape = _DTYPE_OF[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(content) or any(length < 0 for length in shape):
        raise ValueError(f"{entry} is out of bounds")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} does not fill its bytes")
    values = torch.empty(end - begin, dtype=torch.uint8)
    values.numpy().data[:] = content[begin:end]
    return values.view(dtype).reshape(shape)
