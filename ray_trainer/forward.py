"""How the model is called: precision, distributed wrapper, exchange of gradients."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ray_trainer.config import TrainingConfig
from ray_trainer.distributed import wrap_model


@dataclass(frozen=True)
class Forward:
    """The model and the way to call it.

    Attributes:
        model: the bare model, whose names checkpoints carry. Validation calls it, so that ranks may have
            different numbers of batches there.
        module: what training calls: the model, or its distributed wrapper.
        device: where batches go.
        autocast_dtype: of mixed precision; None for none.
    """

    model: nn.Module
    module: nn.Module
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @classmethod
    def build(cls, model: nn.Module, device: torch.device, config: TrainingConfig) -> "Forward":
        """Compile and wrap a model, already on its device, as configured. Collective."""
        if config.compile_mode is not None:
            model.compile(  # in place, so that names stay as they are
                mode=config.compile_mode, fullgraph=config.compile_fullgraph, dynamic=config.compile_dynamic
            )
        dtype = getattr(torch, config.autocast_dtype) if config.autocast_dtype else None
        return cls(model, wrap_model(model, device), device, dtype)

    def precision(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def without_sync(self) -> AbstractContextManager[object]:
        """The context of a micro-batch after which gradients are not yet exchanged."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()
