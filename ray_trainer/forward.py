"""How the model is called: precision, distributed wrapper, exchange of gradients."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ray_trainer import distributed, fsdp
from ray_trainer.config import TrainingConfig
from ray_trainer.distributed import wrap_model

T = TypeVar("T")


@dataclass(frozen=True)
class Forward:
    """The model and the way to call it.

    Attributes:
        model: the bare model, whose names checkpoints carry. Validation calls it, so that ranks may have
            different numbers of batches there.
        module: what training calls: the model, or its distributed wrapper.
        device: where batches go.
        autocast_dtype: of mixed precision; None for none.
        is_sharded: no rank has the whole model, so every pass through it is collective.
    """

    model: nn.Module
    module: nn.Module
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    is_sharded: bool = False

    @classmethod
    def build(
        cls, model: nn.Module, device: torch.device, config: TrainingConfig, broadcasts_buffers: bool = True
    ) -> "Forward":
        """Compile and wrap a model, already on its device, as configured. Collective.

        Args:
            model: the bare one.
            device: of this process.
            config: tells how.
            broadcasts_buffers: see `wrap_model`.
        """
        if config.compile_mode is not None:
            model.compile(  # in place, so that names stay as they are
                mode=config.compile_mode, fullgraph=config.compile_fullgraph, dynamic=config.compile_dynamic
            )
        dtype = getattr(torch, config.autocast_dtype) if config.autocast_dtype else None
        if fsdp.is_sharded(model):
            return cls(model, model, device, dtype, is_sharded=True)
        if config.determinism == "elastic":
            distributed.share_model(model)
            return cls(model, model, device, dtype)  # gradients are exchanged by the loop
        return cls(model, wrap_model(model, device, broadcasts_buffers), device, dtype)

    def precision(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def without_sync(self) -> AbstractContextManager[object]:
        """The context of a micro-batch after which gradients are not yet exchanged."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            return self.module.no_sync()
        return _without_reduction(self.model) if self.is_sharded else nullcontext()

    def begin_step(self, batches: Sequence[T]) -> Sequence[T]:
        """The batches to train on in a step, see `padded`. Collective if the model is sharded."""
        if not self.is_sharded:
            return batches
        fsdp.share_buffers(self.model)
        return self.padded(batches, len(batches))

    def padded(self, batches: Sequence[T], count: int) -> Sequence[T]:
        """The first ``count`` batches, and stand-ins if another rank has more. Collective if sharded.

        Stand-ins are there because all ranks take part in each pass through a sharded model; they must count
        for nothing.

        Args:
            batches: at least one.
            count: how many of them are this rank's.
        """
        if not self.is_sharded:
            return batches[:count]
        missing = fsdp.most_of_all_ranks(count) - count
        return [*batches[:count], *[batches[-1]] * missing]

    def abandon_step(self) -> None:
        """Forget a step that was broken off in the middle of a pass."""
        if self.is_sharded:
            fsdp.forget_broken_step(self.model)


@contextmanager
def _without_reduction(model: nn.Module) -> Iterator[None]:
    fsdp.set_gradient_sync(model, False)
    try:
        yield
    finally:
        fsdp.set_gradient_sync(model, True)


class RunningStatistics:
    """The running means and variances of normalisation layers, as they were before the step.

    A forward pass changes them, so a step that is not carried out must put them back: a batch with a NaN
    would stay in them for ever.

    Args:
        model: whose layers they belong to.
        keeps_others: remember the model's other buffers as well, for `undo`.
    """

    def __init__(self, model: nn.Module, keeps_others: bool = False) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._live = [buffer for layer in layers for buffer in layer.buffers()]
        self._saved = [buffer.clone() for buffer in self._live]
        known = {id(buffer) for buffer in self._live}
        self._model = model
        self._others = [buffer for buffer in model.buffers() if id(buffer) not in known]
        self._versions = [buffer._version for buffer in self._others]
        self._saved_others = [buffer.clone() for buffer in self._others] if keeps_others else []

    def remember(self) -> None:
        """Keep the values of this moment."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)
        if self._saved_others:  # also what was written in a way that leaves no trace, as by ``.data``
            torch._foreach_copy_(self._saved_others, self._others)
        self._versions = [buffer._version for buffer in self._others]

    def are_complete(self) -> bool:
        """Whether no other buffer of the model was replaced, or written without having been kept."""
        there = {id(buffer) for buffer in self._model.buffers()}
        is_there = all(id(buffer) in there for buffer in (*self._live, *self._others))
        are_untouched = self._versions == [buffer._version for buffer in self._others]
        return is_there and (bool(self._saved_others) or are_untouched)

    def share(self) -> None:
        """Take over all buffers of rank 0, as they are in a checkpoint. Collective where there are any."""
        distributed.broadcast_all(list(self._model.buffers()), source=0)

    def undo(self) -> None:
        """Put back all that was kept: the step was broken off."""
        self.put_back()
        if self._saved_others:
            torch._foreach_copy_(self._others, self._saved_others)

    def put_back(self) -> None:
        """Return to the values that were kept."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)
