"""Everything that can be wrong with a TaskSpec, found in one pass."""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from ray_trainer.losses import LossStrategyRegistry
from ray_trainer.losses.registry import BUILT_IN
from ray_trainer.task.kinds import LOSS_ALIASES, MODALITIES, TASK_ALIASES, TASK_KINDS, TaskKind, kind_of

_FAMILIES = ("decoder_only", "encoder_only", "encoder_decoder")
_ROLES = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")
_TOKENS = tuple(f"{role}{suffix}" for role in _ROLES for suffix in ("_token_id", ""))
_ADDITIONAL = ("shift_labels", "num_classes", "class_weights")
_OUTPUT = ("num_classes", "vocab_size")
_SCHEMA = ("dtype", "shape", "min", "max")


class SpecFields(Protocol):
    """The fields of a TaskSpec; their values may be anything when this module looks at them."""

    name: Any
    task_type: Any
    model_family: Any
    input_fields: Any
    target_field: Any
    loss_type: Any
    metrics: Any
    special_tokens: Any
    additional_config: Any
    modality: Any
    input_schema: Any
    output_schema: Any


def did_you_mean(value: object, options: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" for the option that is closest, '' where none is close."""
    close = difflib.get_close_matches(str(value), list(options), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def spec_errors(spec: SpecFields) -> list[str]:
    """Return all errors, each with the field, its value, what is allowed and what to do."""
    kind = kind_of(spec.task_type) if isinstance(spec.task_type, str) else None
    return [
        *_name_errors(spec),
        *_task_type_errors(spec, kind),
        *_field_errors(spec),
        *_token_errors(spec),
        *_additional_errors(spec, kind),
        *_schema_errors(spec),
    ]


def _name_errors(spec: SpecFields) -> Iterator[str]:
    if not isinstance(spec.name, str) or not spec.name:
        yield f"name is {spec.name!r}. Give a non-empty string."
    if not isinstance(spec.model_family, str):
        yield f"model_family is {spec.model_family!r}. Give a string."
    elif spec.model_family not in _FAMILIES:
        hint = did_you_mean(spec.model_family, _FAMILIES, cutoff=0.85)
        if hint:  # any other word is the user's own
            yield f"model_family is {spec.model_family!r}{hint}"
    if spec.modality not in MODALITIES and (spec.modality or kind_of(str(spec.task_type))):
        yield _not_among("modality", spec.modality, MODALITIES)


def _task_type_errors(spec: SpecFields, kind: TaskKind | None) -> Iterator[str]:
    if kind is None:
        yield _not_among("task_type", spec.task_type, (*TASK_KINDS, *TASK_ALIASES))
        return
    if str(spec.task_type).startswith("vision") and spec.modality in ("text", "tabular"):
        yield f"modality is {spec.modality!r}, but task_type is {spec.task_type!r}. Use 'vision'."
    own = [name for name in LossStrategyRegistry.list_available() if name not in BUILT_IN]
    if spec.loss_type not in (*kind.losses, *own):
        known = spec.loss_type in (*BUILT_IN, *LOSS_ALIASES)
        why = f" does not fit task_type {spec.task_type!r}" if known else " is not registered"
        hint = did_you_mean(spec.loss_type, (*kind.losses, *own))
        yield f"loss_type {spec.loss_type!r}{why}{hint or '.'} Use one of {', '.join((*kind.losses, *own))}."
    if not _strings(spec.metrics):
        yield f"metrics is {spec.metrics!r}. Give a list of names."
    else:
        yield from (_not_among("metrics", m, kind.metrics) for m in spec.metrics if m not in kind.metrics)


def _field_errors(spec: SpecFields) -> Iterator[str]:
    if not _strings(spec.input_fields) or (not spec.input_fields and kind_of(str(spec.task_type))):
        yield f"input_fields is {spec.input_fields!r}. Give a list of the batch's fields, e.g. ['input_ids']."
    elif len(set(spec.input_fields)) < len(spec.input_fields):
        yield f"input_fields {spec.input_fields!r} names a field twice."
    if not isinstance(spec.target_field, str) or not spec.target_field:
        yield f"target_field is {spec.target_field!r}. Give the name of the field that holds the labels."


def _token_errors(spec: SpecFields) -> Iterator[str]:
    if not isinstance(spec.special_tokens, dict):
        yield f"special_tokens is {spec.special_tokens!r}. Give a mapping such as {{'pad_token_id': 0}}."
        return
    for role, token in spec.special_tokens.items():
        if role not in _TOKENS:
            yield _not_among("special_tokens", role, _TOKENS)
        elif not _whole(token) or token < 0:
            yield f"special_tokens[{role!r}] is {token!r}. Give a token id, a whole number from 0."


def _additional_errors(spec: SpecFields, kind: TaskKind | None) -> Iterator[str]:
    given = spec.additional_config
    if not isinstance(given, dict):
        yield f"additional_config is {given!r}. Give a mapping such as {{'num_classes': 10}}."
        return
    yield from (_not_among("additional_config", key, _ADDITIONAL) for key in given if key not in _ADDITIONAL)
    if "shift_labels" in given:
        if not isinstance(given["shift_labels"], bool):
            yield f"additional_config['shift_labels'] is {given['shift_labels']!r}. Use true or false."
        if kind is not None and kind is not TASK_KINDS["lm"]:
            yield "additional_config['shift_labels'] is for task_type 'lm' only. Leave it out."
    yield from _class_count_errors("additional_config", given)
    if "class_weights" in given:
        yield from _weight_errors(given["class_weights"], given.get("num_classes"), kind)


def _weight_errors(weights: Any, num_classes: Any, kind: TaskKind | None) -> Iterator[str]:
    name = "additional_config['class_weights']"
    if kind is not None and kind.labels == "numbers":
        yield f"{name} means nothing for a regression. Leave it out."
    if not isinstance(weights, list | tuple) or not all(_number(weight) and weight >= 0 for weight in weights):
        yield f"{name} is {weights!r}. Give one number from 0 per class."
    elif _whole(num_classes) and len(weights) != num_classes:
        yield f"{name} has {len(weights)} entries for {num_classes} classes. Give one per class."


def _schema_errors(spec: SpecFields) -> Iterator[str]:
    if isinstance(spec.output_schema, dict):
        yield from (_not_among("output_schema", k, _OUTPUT) for k in spec.output_schema if k not in _OUTPUT)
        yield from _class_count_errors("output_schema", spec.output_schema)
    else:
        yield f"output_schema is {spec.output_schema!r}. Give a mapping such as {{'num_classes': 10}}."
    if not isinstance(spec.input_schema, dict):
        yield f"input_schema is {spec.input_schema!r}. Give a mapping of field to {', '.join(_SCHEMA)}."
        return
    named = [*(spec.input_fields if _strings(spec.input_fields) else ()), spec.target_field]
    for column, schema in spec.input_schema.items():
        if column not in named:
            yield _not_among("input_schema", column, named)
        elif not isinstance(schema, dict):
            yield f"input_schema[{column!r}] is {schema!r}. Give a mapping of {', '.join(_SCHEMA)}."
        else:
            yield from _column_errors(f"input_schema[{column!r}]", schema)


def _column_errors(where: str, schema: dict[str, Any]) -> Iterator[str]:
    yield from (_not_among(where, key, _SCHEMA) for key in schema if key not in _SCHEMA)
    if "dtype" in schema and not isinstance(getattr(torch, str(schema["dtype"]), None), torch.dtype):
        yield f"{where}['dtype'] is {schema['dtype']!r}. Use a name of torch's, e.g. 'int64' or 'float32'."
    if "shape" in schema:
        shape = schema["shape"]
        if not isinstance(shape, list | tuple) or not all(n is None or (_whole(n) and n >= 0) for n in shape):
            yield f"{where}['shape'] is {shape!r}. Give the sizes of one sample, None for any."
    for bound in ("min", "max"):
        if bound in schema and not _number(schema[bound]):
            yield f"{where}[{bound!r}] is {schema[bound]!r}. Give a number."


def _class_count_errors(where: str, given: dict[str, Any]) -> Iterator[str]:
    for key in _OUTPUT:
        if key in given and (not _whole(given[key]) or given[key] < 1):
            yield f"{where}[{key!r}] is {given[key]!r}. Give a whole number from 1."


def _not_among(where: str, value: object, options: Iterable[str]) -> str:
    options = list(options)
    hint = did_you_mean(value, options)
    return f"{where}: {value!r} is unknown{hint or '.'} Allowed: {', '.join(options)}."


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
