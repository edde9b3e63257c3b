"""Fault-tolerant training of PyTorch models, in one process and on Ray clusters.

This is the core: it never imports Ray. ``ray_trainer.cluster`` does.
"""

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
