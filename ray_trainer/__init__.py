"""Fault-tolerant training of PyTorch models, in one process and on Ray clusters.

This is the core: it never imports Ray. ``ray_trainer.cluster`` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_trainer.checkpoint import CheckpointManager, load_weights
    from ray_trainer.config import TrainingConfig, compare_configs
    from ray_trainer.data import CollatorRegistry, DataLoaderConfig, DataLoaderFactory, UniversalDataModule
    from ray_trainer.gradients import GradientAccumulator, GradientMonitor
    from ray_trainer.hooks import DefaultHooks, Request, TrainingHooks
    from ray_trainer.losses import LossResult, LossStrategy, LossStrategyRegistry, get_loss_strategy
    from ray_trainer.metrics import MetricsTracker
    from ray_trainer.seeding import create_seeded_generator, seed_worker, set_random_seed
    from ray_trainer.task import Experiment, TaskSpec, get_default_task_specs
    from ray_trainer.trainer import Trainer

__all__ = [
    "CheckpointManager",
    "CollatorRegistry",
    "DataLoaderConfig",
    "DataLoaderFactory",
    "DefaultHooks",
    "Experiment",
    "GradientAccumulator",
    "GradientMonitor",
    "LossResult",
    "LossStrategy",
    "LossStrategyRegistry",
    "MetricsTracker",
    "Request",
    "TaskSpec",
    "Trainer",
    "TrainingConfig",
    "TrainingHooks",
    "UniversalDataModule",
    "compare_configs",
    "create_seeded_generator",
    "get_default_task_specs",
    "get_loss_strategy",
    "load_weights",
    "seed_worker",
    "set_random_seed",
]

_MODULES = {
    "ray_trainer.checkpoint": ("CheckpointManager", "load_weights"),
    "ray_trainer.config": ("TrainingConfig", "compare_configs"),
    "ray_trainer.data": ("CollatorRegistry", "DataLoaderConfig", "DataLoaderFactory", "UniversalDataModule"),
    "ray_trainer.gradients": ("GradientAccumulator", "GradientMonitor"),
    "ray_trainer.hooks": ("DefaultHooks", "Request", "TrainingHooks"),
    "ray_trainer.losses": ("LossResult", "LossStrategy", "LossStrategyRegistry", "get_loss_strategy"),
    "ray_trainer.metrics": ("MetricsTracker",),
    "ray_trainer.seeding": ("create_seeded_generator", "seed_worker", "set_random_seed"),
    "ray_trainer.task": ("Experiment", "TaskSpec", "get_default_task_specs"),
    "ray_trainer.trainer": ("Trainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a part with its first use (PEP 562): the process that writes checkpoints needs no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
