"""Directories on any file system, and who may write in them."""

from ray_trainer.storage.directory import Storage
from ray_trainer.storage.fence import NO_FENCE, Fence
from ray_trainer.storage.local import Buffer

__all__ = ["NO_FENCE", "Buffer", "Fence", "Storage"]
