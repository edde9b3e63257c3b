"""A file of a checkpoint before it is one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ray_trainer.storage import Buffer

Part = bytes | torch.Tensor


@dataclass(frozen=True)
class FileImage:
    """A file that is yet to be written; tensors in it are the live ones until they are read.

    Attributes:
        name: of the file.
        parts: its content in order. Each tensor begins at a multiple of its element size.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return sum(_size(part) for part in self.parts)

    def chunks(self) -> Iterator[Buffer]:
        """The content, piece by piece; a tensor off the CPU or not contiguous is copied in its turn."""
        for part in self.parts:
            yield part if isinstance(part, bytes) else _content(part)

    def copy_to(self, target: torch.Tensor) -> None:
        """Copy the content into host memory; from a GPU it is there once the current stream is done.

        Args:
            target: ``(size_bytes,)`` of uint8; aligned to 16 bytes.
        """
        end = 0
        for part in self.parts:
            begin, end = end, end + _size(part)
            place = target[begin:end]
            if isinstance(part, bytes):
                place.numpy().data[:] = part
            elif begin < end:
                place.view(part.dtype).view(part.shape).copy_(part.detach(), non_blocking=True)


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.numel() * part.element_size()


def _content(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
