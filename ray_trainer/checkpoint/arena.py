"""Host memory for snapshots: allocated and touched once, used again for each, and seen by a second process."""

import logging
import mmap
import os
import tempfile

import torch

logger = logging.getLogger(__name__)

_ROOM_BYTES = 2 << 20  # histories in a state grow a little from snapshot to snapshot


class Arena:
    """A file in memory, mapped here. Copies into pages that were touched before run at the speed of memory.

    Attributes:
        descriptor: of the file, for another process to map.
        memory: ``(size_bytes,)`` of uint8; pinned where there is a GPU.
    """

    def __init__(self, size_bytes: int) -> None:
        """Allocate and touch, which takes several times as long as the copies that follow.

        Raises:
            OSError: there is not enough memory.
        """
        capacity = _whole_pages(size_bytes + size_bytes // 64 + _ROOM_BYTES)
        self.descriptor = _file_in_memory()
        try:
            os.posix_fallocate(self.descriptor, 0, capacity)
            self._map = mmap.mmap(self.descriptor, capacity)
        except OSError:
            os.close(self.descriptor)
            raise
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8).zero_()
        self._is_pinned = torch.cuda.is_available() and self._pin()

    @property
    def size_bytes(self) -> int:
        """What fits."""
        return self.memory.numel()

    def close(self) -> None:
        """Give the memory back once nothing views it any more."""
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())  # type: ignore[no-untyped-call]
        del self.memory, self._map
        os.close(self.descriptor)

    def _pin(self) -> bool:
        """Let a GPU copy into it directly."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(self.memory.data_ptr(), self.size_bytes, 0))
        if code:
            logger.warning("Memory for snapshots could not be pinned (CUDA error %d); copies will be slower.", code)
        return code == 0


def _file_in_memory() -> int:
    if hasattr(os, "memfd_create"):  # Linux
        return os.memfd_create("ray_trainer_snapshot", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
