"""Losses over numbers that do not exclude each other: several labels per sample, and regression."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_trainer.errors import ConfigError, DataError
from ray_trainer.losses.strategy import (
    IGNORE_LABEL,
    Aligned,
    ClassWeights,
    LossInputs,
    LossResult,
    at_last_unmasked,
    in_loss_precision,
)


class MultiLabelLoss:
    """Binary cross-entropy of every element: (B, C) or (B, T, C) logits, and (B, C) labels in 0..1.

    Of a sequence of logits the last unmasked position decides. An element of -100 (not annotated) is ignored.
    The metric is the share of elements that are right at a probability of one half.

    Args:
        class_weights: (C,), torch's ``pos_weight``: how many times a positive of this class weighs. The count
            stays one of elements, as torch's mean does. ``class_weights`` among the inputs win over them.
    """

    metric = "accuracy"
    has_perplexity = False

    def __init__(self, class_weights: Any = None) -> None:
        self._class_weights = ClassWeights(class_weights)

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        """Return the loss summed over elements, and their number."""
        return self.reduce(self.align(inputs))

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each logit with its label, and mask those that are not annotated."""
        logits, labels = in_loss_precision(inputs["logits"]), inputs["labels"]
        if logits.dim() == 3 and labels.dim() == 2:
            logits = at_last_unmasked(logits, inputs.get("attention_mask"))
        if logits.dim() < 2 or logits.shape != labels.shape:
            raise DataError(
                f"multi-label classification needs one label per logit; got logits {tuple(logits.shape)} and "
                f"labels {tuple(labels.shape)}. Give a 0/1 vector of length {logits.shape[-1]} per sample, "
                "or choose a classification task_type for class numbers."
            )
        mask = labels != IGNORE_LABEL
        weights = self._class_weights.of(inputs, logits)
        return Aligned(logits, labels.to(logits.dtype), torch.count_nonzero(mask), weights, mask)

    def reduce(self, aligned: Aligned) -> LossResult:
        """Return the summed binary cross-entropy of the unmasked elements."""
        logits, labels, count, pos_weight, mask = aligned
        assert mask is not None
        total = F.binary_cross_entropy_with_logits(
            logits, labels, weight=mask.to(logits.dtype), pos_weight=pos_weight, reduction="sum"
        )
        return LossResult(total, count)

    def measure(self, aligned: Aligned) -> tuple[Tensor, Tensor | int]:
        """Return how many unmasked elements are right, and how many there are."""
        assert aligned.mask is not None
        right = (aligned.logits > 0) == (aligned.labels > 0.5)
        return torch.count_nonzero(right & aligned.mask), aligned.count


class RegressionLoss:
    """Squared, absolute or Huber error of every element: logits and labels of (B,), (B, 1) or (B, D).

    (B, 1) and (B,) are the same B numbers and are paired one to one; any other difference in shape is
    refused, because torch would broadcast it to (B, B). Every number is a value: -100 is not ignored here.
    The metric is the mean absolute error.

    Args:
        kind: 'mse', 'l1' or 'huber'.
        delta: Huber only: the error beyond which it grows linearly.
    """

    metric = "mae"
    has_perplexity = False

    def __init__(self, kind: Literal["mse", "l1", "huber"] = "mse", delta: float = 1.0) -> None:
        if kind not in ("mse", "l1", "huber"):
            raise ConfigError(f"kind of regression loss is {kind!r}. Use one of 'mse', 'l1', 'huber'.")
        if not delta > 0:
            raise ConfigError(f"delta of the Huber loss is {delta!r}. Use a number above 0.")
        self._kind = kind
        self._delta = delta

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        """Return the loss summed over elements, and their number."""
        return self.reduce(self.align(inputs))

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each output with its label, never by broadcasting."""
        logits, labels = in_loss_precision(inputs["logits"]), inputs["labels"]
        if logits.shape != labels.shape:
            if {logits.shape, labels.shape} != {logits.shape[:1], (*logits.shape[:1], 1)}:
                raise DataError(
                    f"regression needs one label per output; got logits {tuple(logits.shape)} and labels "
                    f"{tuple(labels.shape)}. Give the model's last layer as many outputs as the label column "
                    "has numbers per sample."
                )
            labels = labels.reshape(logits.shape)
        return Aligned(logits, labels.to(logits.dtype), labels.numel())

    def reduce(self, aligned: Aligned) -> LossResult:
        """Return the summed error of the chosen kind."""
        if self._kind == "mse":
            total = F.mse_loss(aligned.logits, aligned.labels, reduction="sum")
        elif self._kind == "l1":
            total = F.l1_loss(aligned.logits, aligned.labels, reduction="sum")
        else:
            total = F.huber_loss(aligned.logits, aligned.labels, reduction="sum", delta=self._delta)
        return LossResult(total, aligned.count)

    def measure(self, aligned: Aligned) -> tuple[Tensor, Tensor | int]:
        """Return the summed absolute error, and the number of elements."""
        return (aligned.logits.detach() - aligned.labels).abs().sum(), aligned.count
