"""The contract between a loss and the loop.

Shapes in this package: B samples, T positions, C classes (or vocabulary), D outputs, H x W pixels.
"""

from typing import Any, NamedTuple, Protocol, TypedDict, TypeGuard

import torch
from torch import Tensor

from ray_trainer.errors import DataError

IGNORE_LABEL = -100
"""A label of this value takes no part in loss, count or metric (torch's and Hugging Face's convention)."""


class LossResult(NamedTuple):
    """A loss that can be added up over micro-batches and workers before it is divided.

    The mean of means is wrong as soon as two batches differ in size or padding; the sum of sums over
    the sum of counts never is.
    """

    sum: Tensor
    """Scalar, differentiable, at least float32; 0 (with a graph) where nothing counts."""
    count: Tensor | int  # type: ignore[assignment]  # shadows tuple.count, which nobody wants here
    """Unmasked tokens, samples, pixels or elements; with class weights the sum of their weights."""

    @property
    def mean(self) -> Tensor:
        """Sum over count; 0, not NaN, where nothing counts."""
        if isinstance(self.count, Tensor):
            return self.sum / torch.where(self.count > 0, self.count, 1)
        return self.sum / (self.count or 1)


class LossInputs(TypedDict, total=False):
    """What a strategy may read; everything but ``logits`` and ``labels`` is optional."""

    logits: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    """(B, T), 0 where a position is padding. Where it is given, `pad_token_id` is not looked at."""
    pad_token_id: int | None
    pixel_values: Tensor
    class_weights: Tensor | None


class LossStrategy(Protocol):
    """A loss of one batch."""

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        """Return the loss summed over what counts, and how much counted. Never waits for the device."""
        ...


class Aligned(NamedTuple):
    """Logits and labels, masked and shifted: element i of one belongs to element i of the other."""

    logits: Tensor
    """Float32 or float64. Cross-entropy: classes in dimension 1. Element-wise: the shape of `labels`."""
    labels: Tensor
    count: Tensor | int  # type: ignore[assignment]  # as in LossResult
    """How many labels count; shared by the loss and the metric."""
    class_weights: Tensor | None = None
    mask: Tensor | None = None
    """Element-wise losses: which elements count; None for all. Cross-entropy marks them in the labels."""


class AligningLoss(LossStrategy, Protocol):
    """A strategy that also tells what it compares with what, so that a metric ignores what the loss ignores.

    A user's own strategy may implement this to get its metric for free; `compute_loss` must equal
    ``reduce(align(inputs))``.
    """

    metric: str
    """Name of what `measure` returns: 'accuracy' or 'mae'; '' for nothing."""
    has_perplexity: bool
    """Whether exp(mean loss) is a perplexity: the count is one of tokens."""

    def align(self, inputs: LossInputs) -> Aligned:
        """Mask, shift and upcast; raises `DataError` where shapes or dtypes do not fit."""
        ...

    def reduce(self, aligned: Aligned) -> LossResult:
        """Return the loss of aligned logits and labels."""
        ...

    def measure(self, aligned: Aligned) -> tuple[Tensor, Tensor | int]:
        """Return sum and count of the metric, detached."""
        ...


def aligns(loss: Any) -> TypeGuard[AligningLoss]:
    """Whether a strategy can say what it compares; wrappers can where the strategy inside them can."""
    return bool(getattr(loss, "metric", "")) and callable(getattr(loss, "align", None))


def in_loss_precision(logits: Tensor) -> Tensor:
    """Return logits as float32 (float64 stays): sums over a vocabulary lose too much in 8 or 11 bits."""
    if logits.dtype is torch.float32 or logits.dtype is torch.float64:
        return logits
    if not logits.is_floating_point():
        raise DataError(
            f"logits are {logits.dtype}, of which no loss can be computed. Return the floating-point "
            "output of the last layer, not a prediction; for a quantized model wrap the loss in "
            "QuantizationSafeLoss."
        )
    return logits.float()


def at_last_unmasked(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return of (B, T, C) logits those (B, C) of the last real position, whichever side is padded."""
    if attention_mask is None:
        return logits[:, -1]
    require_mask_shape(attention_mask, logits.shape[:2], "the positions of the logits")
    positions = torch.arange(logits.shape[1], device=logits.device)
    last = ((attention_mask != 0) * positions).argmax(dim=1)
    return logits[torch.arange(logits.shape[0], device=logits.device), last]


def require_mask_shape(mask: Tensor, shape: torch.Size, what: str) -> None:
    """Refuse an attention mask that would broadcast instead of belonging to each position."""
    if mask.shape != shape:
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, but {what} have {tuple(shape)}. "
            "Give a mask with one value per position: 1 for real tokens, 0 for padding."
        )


class ClassWeights:
    """Weights given once, kept on the device where they were last needed; those of a batch win over them."""

    def __init__(self, weights: Any = None) -> None:
        self._weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)

    def of(self, inputs: LossInputs, logits: Tensor) -> Tensor | None:
        """Return the weights for this batch, None for unweighted."""
        given = inputs.get("class_weights")
        if given is not None:
            return given.to(logits)
        if self._weights is None:
            return None
        self._weights = self._weights.to(logits)
        return self._weights
