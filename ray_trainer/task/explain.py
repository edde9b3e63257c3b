"""Why a model could not take a batch, in the user's words. Called when it already failed."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_trainer.errors import DataError

_MISFITS = (
    "shapes cannot be multiplied",
    "size mismatch",
    "must match",
    "channels",
    "expected input",
    "expected scalar type",
    "expected tensor for argument",
    "expected m1",
    "expected mat1",
    "normalized_shape",
    "same dtype",
    "should be the same",
    "input.size(-1) must be equal",
    "invalid for input of size",
    "dimension out of range",
)
_OUT_OF_RANGE = "index out of range in self"


def explain_forward_error(error: BaseException, batch: Any, model: nn.Module) -> DataError | None:
    """Return what does not fit between a batch and a model, or None where the error has another cause.

    Args:
        error: what forward raised.
        batch: what was taken apart for it.
        model: the bare model, for its signature and its embeddings.
    """
    text = str(error)
    wrong_call = isinstance(error, TypeError) and "forward()" in text
    out_of_range = isinstance(error, IndexError) and _OUT_OF_RANGE in text
    misfit = isinstance(error, RuntimeError | IndexError) and any(phrase in text.lower() for phrase in _MISFITS)
    if not (wrong_call or out_of_range or misfit):
        return None
    signature = f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
    message = (
        f"the batch does not fit the model: {text.rstrip(chr(46))}. "
        f"The batch has {describe_batch(batch)}; it went into {signature}. "
    )
    if out_of_range:
        return DataError(message + _embedding_advice(batch, model))
    if wrong_call:
        return DataError(message + "Name the inputs in input_fields of the TaskSpec, in the order of parameters.")
    return DataError(
        message + "Compare shapes and dtypes with what the first layer takes; convert in the dataset or the model."
    )


def describe_batch(batch: Any) -> str:
    """Return the fields of a batch with dtype and shape: "input_ids int64 (8, 32), labels int64 (8,)"."""
    return ", ".join(f"{name} {describe_value(value)}" for name, value in named_fields(batch)) or "no fields"


def named_fields(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield each field of a batch with its name, or with its position where it has none."""
    if isinstance(batch, Mapping):
        yield from ((repr(name), value) for name, value in batch.items())
    elif isinstance(batch, tuple | list):
        yield from ((f"element {index}", value) for index, value in enumerate(batch))
    else:
        yield "the batch", batch


def describe_value(value: Any) -> str:
    """Return type and shape of a field's value, or the type of what a list holds."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"{type(value).__name__} of {type(value[0]).__name__}"
    return type(value).__name__


def _embedding_advice(batch: Any, model: nn.Module) -> str:
    ranges = [
        f"{name} holds {int(value.min())}..{int(value.max())}"
        for name, value in named_fields(batch)
        if isinstance(value, Tensor) and value.numel() and value.dtype in (torch.int32, torch.int64)
    ]
    embeddings = [
        f"{name or type(module).__name__} 0..{module.num_embeddings - 1}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    return (
        f"{', '.join(ranges)}; the embeddings of the model take {', '.join(embeddings) or 'fewer'}. Give the "
        "model the vocabulary of the tokenizer (or as many positions as the sequences are long), "
        "or correct the column."
    )
