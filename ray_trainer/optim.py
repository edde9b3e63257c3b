"""Optimizer and learning-rate schedule from the configuration. Schedules count updates, not batches."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ray_trainer.config import TrainingConfig
from ray_trainer.errors import ConfigError


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimizer over all trainable parameters, in torch's fused form where it exists.

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to train. "
            "Unfreeze some, or build the model with parameters."
        )
    has_sparse_gradients = any(getattr(module, "sparse", False) for module in model.modules())
    fused = not has_sparse_gradients and all(parameter.is_floating_point() for parameter in parameters)
    if config.optimizer == "sgd" and any(hasattr(parameter, "placements") for parameter in parameters):
        fused = False  # torch 2.13 has no fused SGD for sharded parameters
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
    }
    return classes[config.optimizer](parameters, lr=config.learning_rate, fused=fused, **_settings(config))


def refuse_unusable(model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> None:
    """Check an optimizer and a schedule that the user built.

    Raises:
        ConfigError: they would fail in the first step, or never have an effect.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer: LBFGS asks for the loss several times a step, which is not supported. Use another."
        )
    if optimizer is not None:
        own = {id(parameter) for parameter in model.parameters()}
        if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ConfigError(
                "optimizer: it has parameters that are not the model's, so it would train something else. "
                "Build it from model.parameters() of the model that is passed."
            )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "scheduler: ReduceLROnPlateau follows a metric, but schedules are advanced by each update here. "
            "Use one that counts steps."
        )
    if scheduler is not None and optimizer is None:
        raise ConfigError("scheduler: it belongs to an optimizer; pass that as well, as optimizer=...")
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError("scheduler: it changes the rate of another optimizer than the one that is passed.")


def follow_config(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> None:
    """Let an optimizer that was restored go on with the settings of the configuration, as it is now."""
    for group in optimizer.param_groups:
        group.update(_settings(config))


def follow_schedule(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, config: TrainingConfig | None
) -> None:
    """Let a schedule that was restored go on with its own course: what was saved may be another's rate.

    Args:
        optimizer: gets the rate of its next update.
        scheduler: from `build_scheduler`.
        config: gives the base rate; None keeps the optimizer's own.
    """
    assert isinstance(scheduler, LambdaLR)
    if config is not None:
        scheduler.base_lrs = [config.learning_rate for _ in scheduler.base_lrs]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _settings(config: TrainingConfig) -> dict[str, Any]:
    if config.optimizer == "sgd":
        return {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return {"betas": config.betas, "weight_decay": config.weight_decay}


def build_scaler(config: TrainingConfig, device: torch.device) -> GradScaler | None:
    """The loss scaler that fp16 needs, or None."""
    return GradScaler(device.type) if config.autocast_dtype == "float16" else None


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int | None) -> LambdaLR:
    """The configured schedule over ``total_steps`` updates.

    Raises:
        ConfigError: the schedule needs the number of steps and nothing tells it.
    """
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))


def learning_rate_factor(config: TrainingConfig, total_steps: int | None) -> Callable[[int], float]:
    """What the base rate is multiplied with for the update after ``step`` updates.

    Linear warm-up from one ``warmup_steps``-th to 1, then the decay of ``lr_scheduler_type`` down to
    ``min_lr_ratio`` at the last step. ``wsd`` is warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395,
    section 4) with a linear decay over the last ``decay_ratio`` of all steps.
    """
    kind = config.lr_scheduler_type
    if total_steps is None and (kind != "constant" or config.warmup_steps is None):
        if kind != "constant":
            raise ConfigError(
                f"lr_scheduler_type '{kind}' needs the number of steps, but the training data has no length. "
                "Set max_steps, or use lr_scheduler_type 'constant' with warmup_steps."
            )
        total_steps = 0
    total = total_steps or 0
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * total)
    floor = config.min_lr_ratio
    decay_start = max(warmup, total - round(config.decay_ratio * total)) if kind == "wsd" else warmup
    decay_steps = max(1, total - decay_start)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant" or step < decay_start:
            return 1.0
        done = min(1.0, (step - decay_start) / decay_steps)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
        return floor + (1 - floor) * shape

    return factor
