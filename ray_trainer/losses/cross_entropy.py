"""Losses over one right class per element: next tokens, sequences, images, pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_trainer.errors import DataError
from ray_trainer.losses.strategy import (
    IGNORE_LABEL,
    Aligned,
    ClassWeights,
    LossInputs,
    LossResult,
    at_last_unmasked,
    in_loss_precision,
    require_mask_shape,
)


class _CrossEntropy:
    """Summed cross-entropy of what a subclass aligns; loss and accuracy share one count.

    Args:
        class_weights: (C,), one factor per class. As in torch the mean is then the weighted one: the count is
            the sum of the weights of the labels. ``class_weights`` among the inputs win over them.
    """

    metric = "accuracy"
    has_perplexity = False

    def __init__(self, class_weights: Any = None) -> None:
        self._class_weights = ClassWeights(class_weights)

    def align(self, inputs: LossInputs) -> Aligned:
        raise NotImplementedError

    def compute_loss(self, inputs: LossInputs) -> LossResult:
        return self.reduce(self.align(inputs))

    def reduce(self, aligned: Aligned) -> LossResult:
        logits, labels, count, weights, _ = aligned
        total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_LABEL, reduction="sum")
        if weights is None:
            return LossResult(total, count)
        return LossResult(total, (weights[labels.clamp(min=0)] * (labels != IGNORE_LABEL)).sum())

    def measure(self, aligned: Aligned) -> tuple[Tensor, Tensor | int]:
        # Ignored labels are negative, so no prediction equals them: the mask is not needed again.
        return torch.count_nonzero(aligned.logits.argmax(1) == aligned.labels), aligned.count

    def _aligned(self, inputs: LossInputs, logits: Tensor, labels: Tensor) -> Aligned:
        logits = in_loss_precision(logits)
        count = torch.count_nonzero(labels != IGNORE_LABEL)
        return Aligned(logits, labels, count, self._class_weights.of(inputs, logits))


class Seq2SeqLoss(_CrossEntropy):
    """Cross-entropy of each position with the label at the same position: (B, T, C) logits, (B, T) labels.

    For decoders that are fed shifted labels, and for token classification and masked language models.
    ``attention_mask`` is that of the *labels*, not of the encoder's input.

    Args:
        class_weights: one factor per token of the vocabulary.
        pad_token_id: ignored where neither the inputs name one nor a mask decides.
    """

    has_perplexity = True

    def __init__(self, class_weights: Any = None, pad_token_id: int | None = None) -> None:
        super().__init__(class_weights)
        self._pad_token_id = pad_token_id

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each position with its own label."""
        logits, labels = _token_logits(inputs)
        labels = _without_padding(labels, inputs, self._pad_token_id)
        return self._aligned(inputs, logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


class LanguageModelingLoss(_CrossEntropy):
    """Cross-entropy of each position with the label of the next one: (B, T, C) logits, (B, T) labels.

    The labels move and the logits stay: dropping the last position of the logits instead would copy the
    largest tensor of the step. (As in Hugging Face's ``ForCausalLMLoss``; the result is that of the slices.)

    Args:
        shift: False compares each position with its own label.
        class_weights: one factor per token of the vocabulary.
        pad_token_id: ignored where neither the inputs name one nor a mask decides.
    """

    has_perplexity = True

    def __init__(self, shift: bool = True, class_weights: Any = None, pad_token_id: int | None = None) -> None:
        super().__init__(class_weights)
        self._shift = shift
        self._pad_token_id = pad_token_id

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each position with the label of the next one."""
        logits, labels = _token_logits(inputs)
        labels = _without_padding(labels, inputs, self._pad_token_id)
        if self._shift:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_LABEL)
        return self._aligned(inputs, logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


class ClassificationLoss(_CrossEntropy):
    """Cross-entropy of one class per sample: (B, C) logits, or (B, T, C), and (B,) labels.

    Of a sequence of logits the last unmasked position decides, the last one where there is no mask; a
    sample without any real token is ignored. A pad token means nothing here: 0 is a class like any other.
    """

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each sample's logits with its class."""
        logits, labels = inputs["logits"], inputs["labels"]
        if logits.dim() == 3:
            mask = inputs.get("attention_mask")
            logits = at_last_unmasked(logits, mask)
            if mask is not None:
                labels = _class_labels(labels).masked_fill(~mask.bool().any(dim=1), IGNORE_LABEL)
        if logits.dim() != 2 or labels.dim() != 1:
            raise _misfit("classification", "(B, C) or (B, T, C) logits and (B,) labels", inputs)
        return self._aligned(inputs, logits, _class_labels(labels))


class VisionLoss(_CrossEntropy):
    """Cross-entropy of one class per image or per pixel: (B, C) with (B,), or (B, C, H, W) with (B, H, W)."""

    def align(self, inputs: LossInputs) -> Aligned:
        """Pair each image's or pixel's logits with its class."""
        logits, labels = inputs["logits"], inputs["labels"]
        if logits.dim() not in (2, 4) or labels.dim() != logits.dim() - 1:
            wanted = "(B, C) logits and (B,) labels, or (B, C, H, W) logits and (B, H, W) labels"
            raise _misfit("vision", wanted, inputs)
        if logits.dim() == 4 and labels.shape[1:] != logits.shape[2:]:
            raise _misfit("segmentation", "one label per pixel of the logits", inputs)
        return self._aligned(inputs, logits, _class_labels(labels))


def _token_logits(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    logits, labels = inputs["logits"], inputs["labels"]
    if logits.dim() != 3 or labels.dim() != 2:
        raise _misfit("a loss over tokens", "3D logits (B, T, C) and 2D labels (B, T)", inputs)
    if labels.shape != logits.shape[:2]:
        raise _misfit("a loss over tokens", "one label per position of the logits", inputs)
    return logits, _class_labels(labels)


def _without_padding(labels: Tensor, inputs: LossInputs, pad_token_id: int | None) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None:
        require_mask_shape(mask, labels.shape, "the labels")
        return labels.masked_fill(mask == 0, IGNORE_LABEL)
    given = inputs.get("pad_token_id")
    pad_token_id = pad_token_id if given is None else given
    if pad_token_id is None:
        return labels
    return labels.masked_fill(labels == pad_token_id, IGNORE_LABEL)


def _class_labels(labels: Tensor) -> Tensor:
    if labels.dtype is torch.int64:
        return labels
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels are {labels.dtype}, but a class is a whole number. Give integer labels (0..C-1, or "
            f"{IGNORE_LABEL} to ignore one), or choose task_type 'regression' or 'multilabel'."
        )
    return labels.long()


def _misfit(task: str, wanted: str, inputs: LossInputs) -> DataError:
    logits, labels = tuple(inputs["logits"].shape), tuple(inputs["labels"].shape)
    return DataError(
        f"{task} needs {wanted}; got logits {logits} and labels {labels}. "
        "Check the output of the model's last layer, the label column, and the task_type."
    )
