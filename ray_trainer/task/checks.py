"""What is checked about the first batch, so that a wrong column is named before the first step."""

from typing import Any

import torch
from torch import Tensor

from ray_trainer.errors import DataError
from ray_trainer.losses import IGNORE_LABEL
from ray_trainer.losses.explain import label_range_error
from ray_trainer.task.explain import describe_value


def check_tensor(name: str, value: Any) -> None:
    """Refuse text and other objects that a collator left as they were."""
    if isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(v, str) for v in value)):
        raise DataError(
            f"field {name!r} holds text ({type(value).__name__} of str); a model takes tensors. "
            "Tokenize it in the "
            "dataset or in collate_fn, or leave the column out."
        )


def check_same_rows(name: str, value: Any, target_name: str, target: Tensor) -> None:
    """Refuse inputs and labels of different length."""
    if isinstance(value, Tensor) and value.dim() and target.dim() and value.shape[0] != target.shape[0]:
        raise DataError(
            f"field {name!r} has {value.shape[0]} rows and the target {target_name!r} has {target.shape[0]}. "
            "Every sample needs both: check the dataset or collate_fn."
        )


def check_target(name: str, target: Any, labels: str, num_classes: int | None, ignored: int | None) -> None:
    """Refuse labels that the task's loss cannot take.

    Args:
        name: of the label column.
        target: its values.
        labels: what the task takes, as in `TaskKind.labels`.
        num_classes: None for unknown.
        ignored: the padding token, which is not looked at.
    """
    if not isinstance(target, Tensor):
        raise DataError(
            f"the target {name!r} is a {describe_value(target)}, not a tensor. Let the dataset or the pipeline give "
            "numbers of one shape, for example the number of a class in place of its name."
        )
    if labels in ("tokens", "classes"):
        _check_class_numbers(name, target, num_classes, ignored)
    elif labels == "flags":
        _check_flags(name, target)
    elif target.is_floating_point() and not bool(target.isfinite().all()):
        row = int((~target.isfinite()).nonzero()[0, 0]) if target.dim() else 0
        raise DataError(f"the target {name!r} is NaN or infinite in row {row}. Remove or fill such rows.")


def check_schema(name: str, value: Tensor, schema: dict[str, Any]) -> None:
    """Refuse a field that is not what `TaskSpec.input_schema` says."""
    dtype = str(value.dtype).removeprefix("torch.")
    if schema.get("dtype", dtype) != dtype:
        raise DataError(
            f"field {name!r} is {dtype}, input_schema says {schema['dtype']}. Convert it in the dataset, or "
            "correct the schema."
        )
    shape = schema.get("shape")
    sample = tuple(value.shape[1:])
    if shape is not None and (
        len(shape) != len(sample) or any(want not in (None, got) for want, got in zip(shape, sample, strict=True))
    ):
        raise DataError(
            f"a sample of field {name!r} has shape {sample}, input_schema says {tuple(shape)}. Resize or pad "
            "it in the dataset, or correct the schema."
        )
    if not value.numel():
        return
    low, high = value.min().item(), value.max().item()
    least, most = schema.get("min", low), schema.get("max", high)
    if not (least <= low and high <= most):  # also where NaN is among the values
        raise DataError(
            f"field {name!r} holds values from {low} to {high}, input_schema allows {least} to "
            f"{most}. Correct "
            "the column or the schema."
        )


def _check_class_numbers(name: str, target: Tensor, num_classes: int | None, ignored: int | None) -> None:
    if target.is_floating_point():
        raise DataError(
            f"the target {name!r} is {target.dtype}, but a class is a whole number. Convert "
            "the column to int64, or choose task_type 'regression' or 'multilabel'."
        )
    if num_classes is None or target.dtype is torch.bool:
        return
    labels = target if ignored is None else target.long().masked_fill(target == ignored, IGNORE_LABEL)
    error = label_range_error(labels, num_classes, name, "the task has")
    if error is not None:
        raise error


def _check_flags(name: str, target: Tensor) -> None:
    values = target.double()
    wrong = ~(((values >= 0) & (values <= 1)) | (values == IGNORE_LABEL))
    if bool(wrong.any()):
        raise DataError(
            f"the target {name!r} holds {values[wrong][0].item():g}; labels of a multi-label task "
            "must be in 0..1 "
            f"(or {IGNORE_LABEL} to be ignored). Give a 0/1 vector per sample, or choose a "
            "classification task_type."
        )
