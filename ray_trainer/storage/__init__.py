"""Directories on any file system."""

from ray_trainer.storage.directory import Storage
from ray_trainer.storage.local import Buffer

__all__ = ["Buffer", "Storage"]
