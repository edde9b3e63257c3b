"""Hooks: what users see of a training while it runs, and what they may ask of it."""

from ray_trainer.hooks.caller import HookCaller
from ray_trainer.hooks.checks import Hook
from ray_trainer.hooks.contract import (
    NO_REQUEST,
    CheckpointSaved,
    DefaultHooks,
    Request,
    ResumeRecord,
    StepRecord,
    TrainingHooks,
    requested,
)

__all__ = [
    "NO_REQUEST",
    "CheckpointSaved",
    "DefaultHooks",
    "Hook",
    "HookCaller",
    "Request",
    "ResumeRecord",
    "StepRecord",
    "TrainingHooks",
    "requested",
]
