"""Which part of model and optimizer this process has, and how their state finds its way there."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ray_trainer import fsdp
from ray_trainer.checkpoint.shards import Region, Share
from ray_trainer.config import TrainingConfig
from ray_trainer.distributed import same_error_everywhere, world_size
from ray_trainer.state import Stateful

_WAYS = ("foreach", "fused")  # to compute an update
_STATE_NAME = re.compile(r"state\.(\d+)\..+")  # of a tensor in a checkpoint's optimizer file
_UNKNOWN = (None, None)


def place_model(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, config: TrainingConfig
) -> nn.Module:
    """Bring a model to its device: the whole of it, or a shard. Collective with ``parallelism`` "fsdp".

    Args:
        model: changed in place and returned.
        optimizer: of its parameters, if one was built already; keeps working.
        device: of this process.
        config: tells which; one process always has the whole model.
    """
    if config.parallelism != "fsdp" or world_size() == 1:
        return model.to(device)
    before = list(model.parameters())
    fsdp.shard_model(model, device, config)
    if optimizer is not None:
        fsdp.rebind(optimizer, before, list(model.parameters()))
    return model


class Placement:
    """What is kept of a model and its optimizer, on this rank; here the whole of both.

    Attributes:
        parts: for the training's state.
        share: what this rank needs of a checkpoint; None for everything.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts: dict[str, Stateful] = {"model": model, "optimizer": PlacedOptimizer(optimizer)}
        self.share: Share | None = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "Placement":
        """That of a model after `place_model`."""
        return ShardedPlacement(model, optimizer) if fsdp.is_sharded(model) else Placement(model, optimizer)

    def trial(self) -> AbstractContextManager[object]:
        """The context of a forward pass that may fail for what the user passed; all ranks raise the same."""
        return same_error_everywhere()


class ShardedPlacement(Placement):
    """A shard of each."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.parts["model"] = ShardedModel(model)
        self.share = self._share
        self._weights = {name: _region(tensor) for name, tensor in model.state_dict().items()}
        self._parameters = [_region(parameter) for parameter in _parameters(optimizer)]

    def trial(self) -> AbstractContextManager[object]:
        """The pass itself communicates, so a rank that fails in it can't tell the others; its process ends."""
        return nullcontext()

    def _share(self, file: str, name: str, shape: tuple[int, ...]) -> Region | None:
        whole, region = self._weights.get(name, _UNKNOWN) if file == "model" else self._owner(name)
        return region if whole == shape else None

    def _owner(self, name: str) -> tuple[tuple[int, ...] | None, Region | None]:
        """Of the parameter that a tensor of the optimizer's state belongs to, see `_region`."""
        match = _STATE_NAME.fullmatch(name)
        return self._parameters[int(match[1])] if match and int(match[1]) < len(self._parameters) else _UNKNOWN


class ShardedModel:
    """State of a sharded model; takes that of a whole one as well."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Of its shards, under the model's names."""
        return self._model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over whole tensors, or this rank's part of them."""
        own = self._model.state_dict()
        self._model.load_state_dict(
            {name: fsdp.dealt_out(value, own[name]) if name in own else value for name, value in state_dict.items()}
        )


class PlacedOptimizer:
    """State of an optimizer, wherever its parameters are, and wherever those were that it was saved for."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """As torch gives it; of shards, where the parameters are sharded."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over whole tensors, or this rank's part of them.

        How updates are computed follows from where the parameters are and stays: torch would take it over.
        """
        parameters = dict(enumerate(_parameters(self._optimizer)))
        state = {
            index: {
                name: fsdp.dealt_out(value, parameters[index]) if index in parameters else value
                for name, value in values.items()
            }
            for index, values in state_dict["state"].items()
        }
        kept = [{name: group[name] for name in _WAYS if name in group} for group in self._optimizer.param_groups]
        groups = state_dict["param_groups"]
        if len(groups) == len(kept):  # else torch says what is wrong
            groups = [{**group, **own} for group, own in zip(groups, kept, strict=True)]
        self._optimizer.load_state_dict({**state_dict, "state": state, "param_groups": groups})


def _region(tensor: torch.Tensor) -> tuple[tuple[int, ...], Region | None]:
    """The shape of the whole, and this rank's part of it where it is sharded."""
    return tuple(tensor.shape), fsdp.share_of(tensor) if hasattr(tensor, "placements") else None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
