"""Strategies around another strategy."""

import logging
from typing import cast

import torch
from torch import Tensor, nn

from ray_trainer.errors import ConfigError, DataError
from ray_trainer.losses.strategy import (
    Aligned,
    AligningLoss,
    LossInputs,
    LossResult,
    LossStrategy,
    aligns,
    in_loss_precision,
)

logger = logging.getLogger(__name__)


class _AroundLoss:
    """Passes everything on to the strategy inside; has a metric where that one has."""

    def __init__(self, base: LossStrategy) -> None:
        self._base = base
        self.metric = base.metric if aligns(base) else ""
        self.has_perplexity: bool = getattr(base, "has_perplexity", False)

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        return self._base.compute_loss(inputs)

    def align(self, inputs: LossInputs) -> Aligned:
        return cast(AligningLoss, self._base).align(inputs)

    def reduce(self, aligned: Aligned) -> LossResult:
        return cast(AligningLoss, self._base).reduce(aligned)

    def measure(self, aligned: Aligned) -> tuple[Tensor, Tensor | int]:
        return cast(AligningLoss, self._base).measure(aligned)


class PEFTAwareLoss(_AroundLoss):
    """The loss of a model of which only a part trains (LoRA, a frozen backbone).

    Refuses at construction a model in which nothing trains, and logs once how much does: a frozen
    model and one whose adapters were never attached look the same until the loss curve stays flat.

    Raises:
        ConfigError: every parameter is frozen.
    """

    def __init__(self, base: LossStrategy, model: nn.Module) -> None:
        super().__init__(base)
        total = sum(parameter.numel() for parameter in model.parameters())
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if trainable == 0:
            raise ConfigError(
                f"No trainable parameters: all {total} of {type(model).__name__} are frozen, so "
                "training would change nothing. Attach the adapters, or set requires_grad on the "
                "layers that should train."
            )
        logger.info("%d of %d parameters train (%.2f %%)", trainable, total, 100 * trainable / total)


class QuantizationSafeLoss(_AroundLoss):
    """The loss of a model with quantized or low-precision outputs, computed in float32.

    Floats of 16 bits and fewer are upcast, quantized tensors dequantized, integers read as
    ``(value - zero_point) * scale``. The latter two carry no gradient: they can be evaluated, not trained.

    Args:
        base: the loss of the float32 logits.
        scale: of integer logits; without it they are refused.
        zero_point: the integer that stands for 0.
    """

    def __init__(self, base: LossStrategy, scale: float | None = None, zero_point: int = 0) -> None:
        super().__init__(base)
        self._scale = scale
        self._zero_point = zero_point

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        """Return the loss of the dequantized logits."""
        return super().compute_loss(self._in_float(inputs))

    def align(self, inputs: LossInputs) -> Aligned:
        """Align the dequantized logits with the labels."""
        return super().align(self._in_float(inputs))

    def _in_float(self, inputs: LossInputs) -> LossInputs:
        return {**inputs, "logits": self._dequantized(inputs["logits"])}

    def _dequantized(self, logits: Tensor) -> Tensor:
        if logits.is_quantized:
            return logits.dequantize()
        if logits.is_floating_point():
            return in_loss_precision(logits)
        if self._scale is None or logits.dtype is torch.bool:
            raise DataError(
                f"logits have the quantized dtype {logits.dtype}, and nothing says what number "
                "an integer stands for. Give QuantizationSafeLoss(scale=..., zero_point=...), or "
                "dequantize in the model."
            )
        return (logits.float() - self._zero_point) * self._scale
