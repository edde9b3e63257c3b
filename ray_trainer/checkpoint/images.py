"""A file of a checkpoint before it is one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ray_trainer.storage import Buffer
from ray_trainer.storage.sealing import FileInMemory

Part = bytes | torch.Tensor

_ALIGNMENT = 4096  # so that a disk can fetch a file from memory without a copy


@dataclass(frozen=True)
class FileImage:
    """A file that is yet to be written; tensors in it are the live ones until they are read.

    Attributes:
        name: of the file.
        parts: its content in order. Each tensor begins at a multiple of its element size.
    """

    name: str
    parts: tuple[Part, ...]

    @cached_property
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


def lay_out(images: Sequence[FileImage]) -> tuple[list[FileInMemory], int]:
    """Places for files in one piece of memory, and its size."""
    places, end = [], 0
    for image in images:
        places.append(FileInMemory(image.name, end, image.size_bytes))
        end += -(-image.size_bytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def copy_in(images: Sequence[FileImage], places: Sequence[FileInMemory], memory: torch.Tensor) -> None:
    """Copy files to their places in memory; they are there when this returns."""
    for image, place in zip(images, places, strict=True):
        image.copy_to(memory[place.offset : place.offset + place.size_bytes])
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _content(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
