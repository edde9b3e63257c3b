"""Why a loss failed, in the user's words. Called when it already has, so that a good step pays nothing."""

from torch import Tensor

from ray_trainer.errors import DataError
from ray_trainer.losses.strategy import IGNORE_LABEL


def explain_loss_error(
    error: BaseException, logits: Tensor, labels: Tensor, target: str = "labels"
) -> DataError | None:
    """Return what is wrong with the labels, or None where the error has another cause.

    Torch says "Target 10 is out of bounds." on the CPU, and on CUDA it loses the device.

    Args:
        error: what the loss raised.
        logits: (N, C), (B, T, C) or (B, C, H, W).
        labels: class numbers.
        target: name of the label column.
    """
    if "device-side assert" in str(error):
        return DataError(
            f"A CUDA kernel refused its input. Most often a label in {target!r} is outside 0..C-1, or a "
            "token id is outside the vocabulary; the device cannot say which. Run a few steps on "
            "the CPU to see it."
        )
    if logits.dim() < 2 or labels.is_floating_point() or labels.is_complex():
        return None
    classes = logits.shape[1] if logits.dim() == 4 else logits.shape[-1]
    return label_range_error(labels, classes, target, "the model's logits have")


def label_range_error(labels: Tensor, classes: int, target: str, who: str) -> DataError | None:
    """Return the error for class numbers outside 0..classes-1, or None. Waits for the device.

    Args:
        labels: integers of any shape; -100 is allowed.
        classes: how many there are.
        target: name of the label column.
        who: who says so, as in "the model's logits have".
    """
    if labels.numel() and int(labels.min()) >= 0 and int(labels.max()) < classes:
        return None
    labels = labels.long()  # in 8 bits 156 would be -100, and 256 classes would be none
    wrong = (labels != IGNORE_LABEL) & ((labels < 0) | (labels >= classes))
    if not bool(wrong.any()):
        return None
    value = int(labels[wrong][0])
    remedy = (
        f"Give the model's last layer at least {int(labels.max()) + 1} outputs, or number the classes from 0."
        if value >= classes
        else f"Number the classes from 0; only {IGNORE_LABEL} marks a label to ignore."
    )
    return DataError(
        f"Label {value} in {target!r} is out of range: {who} {classes} classes, so labels must be in "
        f"0..{classes - 1} (or {IGNORE_LABEL} to be ignored). "
        f"{int(wrong.sum())} of {labels.numel()} labels are out of range. {remedy}"
    )
