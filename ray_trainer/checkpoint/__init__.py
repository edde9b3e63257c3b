"""Checkpoints: whole or nothing, safe to load, and the right ones kept."""

from ray_trainer.checkpoint.catalog import CheckpointRecord, list_checkpoints, verify
from ray_trainer.checkpoint.commit import Commit
from ray_trainer.checkpoint.direct import CheckpointMetadata
from ray_trainer.checkpoint.manager import CheckpointManager
from ray_trainer.checkpoint.manifest import CheckpointMeta, Manifest
from ray_trainer.checkpoint.memory import MemoryTier
from ray_trainer.checkpoint.restore import Carried, LoadedCheckpoint, Rejection
from ray_trainer.checkpoint.survivors import SurvivorTier
from ray_trainer.checkpoint.tiers import Tier
from ray_trainer.checkpoint.weights import export_weights, load_weights

__all__ = [
    "Carried",
    "CheckpointManager",
    "CheckpointMeta",
    "CheckpointMetadata",
    "CheckpointRecord",
    "Commit",
    "LoadedCheckpoint",
    "Manifest",
    "MemoryTier",
    "Rejection",
    "SurvivorTier",
    "Tier",
    "export_weights",
    "list_checkpoints",
    "load_weights",
    "verify",
]
