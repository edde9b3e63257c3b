"""Weights that a run starts with, from another run."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ray_trainer import fsdp
from ray_trainer.checkpoint import load_weights
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import ConfigError

logger = logging.getLogger(__name__)

_NAMED = 10  # in a message, of each kind


@dataclass(frozen=True)
class InitialWeights:
    """What was taken over, and what was not.

    Attributes:
        source: the checkpoint or run.
        loaded: how many tensors.
        missing: of this model, not in the source.
        unexpected: in the source, not of this model.
        mismatched: of both, with different shapes.
    """

    source: str
    loaded: int
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def problems(self) -> list[str]:
        """Each difference as a part of a sentence."""
        named = (
            ("not in there", self.missing),
            ("not in this model", self.unexpected),
            ("of another shape", self.mismatched),
        )
        return [f"{len(names)} {what} ({_listed(names)})" for what, names in named if names]


def initialise(model: nn.Module, config: TrainingConfig) -> InitialWeights | None:
    """Load the weights of ``init_from`` into a model, also a sharded one; every rank reads them.

    Raises:
        ConfigError: they do not fit, and ``init_partial`` is off; nothing was loaded.
        CheckpointError: they cannot be read.
    """
    if config.init_from is None:
        return None
    weights, own = load_weights(config.init_from), model.state_dict()
    common = [name for name in own if name in weights]
    fitting = [name for name in common if own[name].shape == weights[name].shape]
    found = InitialWeights(
        source=config.init_from,
        loaded=len(fitting),
        missing=[name for name in own if name not in weights],
        unexpected=[name for name in weights if name not in own],
        mismatched=[
            f"{name}: {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
            for name in common
            if name not in fitting
        ],
    )
    problems = found.problems()
    if not fitting or (problems and not config.init_partial):
        advice = "Name a checkpoint of this model, or set init_partial to take over what fits"
        raise ConfigError(f"init_from ({config.init_from!r}) does not fit this model: {'; '.join(problems)}. {advice}.")
    if problems:
        logger.warning("%d tensors were taken from %s; left out: %s.", len(fitting), found.source, "; ".join(problems))
    with torch.no_grad():
        model.load_state_dict({name: fsdp.dealt_out(weights[name], own[name]) for name in fitting}, strict=False)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
