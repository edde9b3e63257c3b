"""Experiment: the parts of a training run that only the user can write."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ray_trainer.config import TrainingConfig
from ray_trainer.errors import ConfigError
from ray_trainer.task.spec import TaskSpec

_PARAMETERS = {
    "build_model": ("model_config",),
    "build_datasets": ("model_config", "training_config"),
    "build_optimizer": ("model", "training_config"),
    "build_hooks": (),
    "collate_fn": ("samples",),
}
_REQUIRED = ("build_model", "build_datasets")


@dataclass(frozen=True)
class Experiment:
    """Functions that build a run's parts, so that each worker can build its own, at every start.

    Attributes:
        build_model: called on every worker, after seeding, so that all start with the same weights.
        build_datasets: called once, on the driver; returns 'train' and, where there is one, 'val'.
        task_spec: without one the task is language modelling.
        build_optimizer: without one the training configuration decides.
        build_hooks: returns one object with any of the methods of `TrainingHooks`.
        collate_fn: makes a batch of a list of samples.

    Raises:
        ConfigError: a part is missing, cannot be called, or takes other arguments; lists all of them.
    """

    build_model: Callable[[Any], nn.Module]
    build_datasets: Callable[[Any, TrainingConfig], Mapping[str, Any]]
    task_spec: TaskSpec | None = None
    build_optimizer: Callable[[nn.Module, TrainingConfig], torch.optim.Optimizer] | None = None
    build_hooks: Callable[[], Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        errors = list(_part_errors(self))
        if errors:
            lines = "\n".join(f"  - {error}" for error in errors)
            raise ConfigError(f"Experiment cannot be used:\n{lines}")


def _part_errors(experiment: Experiment) -> Iterator[str]:
    for name, parameters in _PARAMETERS.items():
        part = getattr(experiment, name)
        if part is None and name not in _REQUIRED:
            continue
        wanted = f"a function {name}({', '.join(parameters)})"
        if isinstance(part, nn.Module):
            yield f"{name} is a model. Give {wanted} instead: every worker builds its own."
        elif not callable(part):
            yield f"{name} is {part!r}. Give {wanted}."
        elif not _takes(part, len(parameters)):
            yield f"{name} takes {inspect.signature(part)}. Give {wanted}."
    spec: Any = experiment.task_spec
    if not isinstance(spec, TaskSpec | None):
        yield f"task_spec is {spec!r}. Give a TaskSpec, e.g. TaskSpec.lm_tiny()."


def _takes(function: Callable[..., Any], num_arguments: int) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C: it will say so itself
        return True
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError:
        return False
    return True
