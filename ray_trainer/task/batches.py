"""Taking a batch apart: what goes into the model and how, what it is judged by."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ray_trainer.errors import DataError
from ray_trainer.task.explain import describe_batch
from ray_trainer.task.spec import TaskSpec

ATTENTION_MASK = "attention_mask"
DEFAULT_TARGET = "labels"

Batch = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
Key = int | str

_NOTHING: dict[str, Any] = {}


class ModelCall(NamedTuple):
    """One batch, ready for the model."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    target: Any
    attention_mask: Any
    """Which labels are real, None where nothing says so."""


class Plan(NamedTuple):
    """Where in a batch of one structure each thing is found."""

    positional: tuple[Key, ...]
    keyword: tuple[tuple[str, Key], ...]
    target: Key
    attention_mask: Key | None


@dataclass(frozen=True)
class ForwardSignature:
    """What a model's forward takes."""

    text: str
    names: tuple[str, ...]
    """Parameters that can be given by name, in order."""
    required: frozenset[str]
    num_positional: float
    takes_any_name: bool

    @classmethod
    def of(cls, model: nn.Module) -> "ForwardSignature":
        """Read it once; calling `inspect` per step would cost more than a small model."""
        signature = inspect.signature(model.forward)
        parameters = signature.parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        single = [*positional, *(p for p in named if p.kind is p.KEYWORD_ONLY)]
        takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return cls(
            text=f"{type(model).__name__}.forward{signature}",
            names=tuple(p.name for p in named),
            required=frozenset(p.name for p in single if p.default is p.empty),
            num_positional=float("inf") if takes_any_number else len(positional),
            takes_any_name=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    def accepts(self, name: str) -> bool:
        """Whether an argument of this name can be given."""
        return self.takes_any_name or name in self.names


class BatchReader:
    """Takes batches apart by a plan that is made once for each structure of batch.

    Args:
        spec: names the fields; None for language modelling: the last element, or the field 'labels', is the
            target, and everything else that forward takes goes into the model.
        model: its forward decides between keywords and positions.
        labels_from_inputs: without a spec, a batch without labels is its own target.
    """

    def __init__(self, spec: TaskSpec | None, model: nn.Module, labels_from_inputs: bool) -> None:
        self.target_field = spec.target_field if spec else DEFAULT_TARGET
        self._fields = tuple(spec.input_fields) if spec else None
        self._labels_from_inputs = labels_from_inputs
        # The attention mask of an encoder-decoder is that of the encoder's input, not of the labels.
        is_seq2seq = spec is not None and spec.kind.losses[0] == "seq2seq"
        self._mask_field = "decoder_attention_mask" if is_seq2seq else ATTENTION_MASK
        self._signature = ForwardSignature.of(model)
        self._plans: dict[int | tuple[str, ...], Plan] = {}

    def read(self, batch: Any) -> ModelCall:
        """Take a batch apart.

        Raises:
            DataError: it is of an unknown type, or a field is missing.
        """
        if isinstance(batch, Tensor):
            batch = (batch,)
        try:
            structure = len(batch) if isinstance(batch, tuple | list) else tuple(batch.keys())
            plan = self._plans.get(structure)
        except (AttributeError, TypeError):
            self._refuse_type(batch)
        if plan is None:
            plan = self._plans[structure] = self._plan(batch)
        positional, keyword, target, mask = plan
        return ModelCall(
            [batch[key] for key in positional] if positional else (),
            {name: batch[key] for name, key in keyword} if keyword else _NOTHING,
            batch[target],
            None if mask is None else batch[mask],
        )

    def target_key(self, batch: Any) -> Key:
        """Where in a batch the target is."""
        return self._plan((batch,) if isinstance(batch, Tensor) else batch).target

    def named_inputs(self, batch: Any) -> dict[str, Any]:
        """Return what goes into the model by the name of its field, by position where it has none."""
        if isinstance(batch, Tensor):
            batch = (batch,)
        plan = self._plan(batch)
        names: dict[Key, str] = {}
        if self._fields and isinstance(batch, tuple | list):
            names = {key: name for name, key in self._names_of(batch).items()}
        keys = (*plan.positional, *(key for _, key in plan.keyword))
        return {names.get(key, key if isinstance(key, str) else f"element {key}"): batch[key] for key in keys}

    def _plan(self, batch: Any) -> Plan:
        if isinstance(batch, tuple | list):
            return self._plan_by_name(self._names_of(batch), batch) if self._fields else self._in_order(batch)
        if not isinstance(batch, Mapping):
            self._refuse_type(batch)
        return self._plan_by_name({name: name for name in batch}, batch)

    def _in_order(self, batch: Any) -> Plan:
        if len(batch) == 1 and self._labels_from_inputs:
            return Plan((0,), (), 0, None)
        if len(batch) < 2:
            raise DataError(
                f"a batch has {len(batch)} element(s): {describe_batch(batch)}. There is no target in it. "
                "Return (inputs, labels) from the dataset."
            )
        return Plan(tuple(range(len(batch) - 1)), (), len(batch) - 1, None)

    def _names_of(self, batch: Any) -> dict[str, Key]:
        """Name the elements of a tuple: the input fields in order, then the target."""
        assert self._fields is not None
        names = [*(name for name in self._fields if name != self.target_field), self.target_field]
        if len(batch) < len(names) and ATTENTION_MASK in names:
            names.remove(ATTENTION_MASK)
        if len(batch) != len(names):
            raise DataError(
                f"a batch has {len(batch)} elements: {describe_batch(batch)}; the task names {len(names)}: "
                f"{', '.join(names)}. Return as many from the dataset, or correct input_fields of "
                "the TaskSpec."
            )
        return {name: index for index, name in enumerate(names)}

    def _plan_by_name(self, keys: Mapping[str, Key], batch: Any) -> Plan:
        target = self.target_field
        if target not in keys and self._fields is None and self._labels_from_inputs and "input_ids" in keys:
            target = "input_ids"
        if target not in keys:
            self._refuse_missing(target, "target", batch)
        inputs = self._inputs_without_spec if self._fields is None else self._inputs_of_spec
        names = inputs(keys, batch)
        positional, keyword = self._arguments(names, keys, batch)
        return Plan(positional, keyword, keys[target], keys.get(self._mask_field))

    def _inputs_without_spec(self, keys: Mapping[str, Key], batch: Any) -> list[str]:
        candidates = [name for name in keys if name != self.target_field]
        names = [name for name in candidates if self._signature.accepts(name)]
        if names:
            return names
        if len(candidates) == 1:  # nothing to confuse it with: given by position
            return candidates
        raise DataError(
            f"no field of the batch ({describe_batch(batch)}) is a parameter of "
            f"{self._signature.text}. Rename "
            "the columns or the parameters, or name the inputs in a TaskSpec(input_fields=[...])."
        )

    def _inputs_of_spec(self, keys: Mapping[str, Key], batch: Any) -> list[str]:
        assert self._fields is not None
        for name in self._fields:
            if name not in keys and name != ATTENTION_MASK:
                self._refuse_missing(name, "input", batch)
        names = [name for name in self._fields if name in keys]
        fits = self._signature.accepts(ATTENTION_MASK) or len(names) <= self._signature.num_positional
        return names if fits else [name for name in names if name != ATTENTION_MASK]

    def _arguments(
        self, names: list[str], keys: Mapping[str, Key], batch: Any
    ) -> tuple[tuple[Key, ...], tuple[tuple[str, Key], ...]]:
        signature = self._signature
        if all(map(signature.accepts, names)) and signature.required <= set(names):
            return (), tuple((name, keys[name]) for name in names)
        misplaced = any(
            name in signature.names and signature.names.index(name) != position for position, name in enumerate(names)
        )
        too_few = len(names) < len(signature.required)
        if len(names) > signature.num_positional or too_few or misplaced:
            raise DataError(
                f"the inputs {', '.join(names)} do not fit {signature.text}, neither by name nor "
                "by position. "
                f"The batch has {describe_batch(batch)}. Name the parameters like the fields, or list "
                "input_fields of the TaskSpec in the order of the parameters."
            )
        return tuple(keys[name] for name in names), ()

    def _refuse_missing(self, name: str, role: str, batch: Any) -> NoReturn:
        field = "target_field" if role == "target" else "input_fields"
        raise DataError(
            f"the {role} field {name!r} is missing: a batch has {describe_batch(batch)}. "
            f"Add the column to the dataset or the collator, or set {field} of the TaskSpec to "
            "one that is there."
        )

    def _refuse_type(self, batch: Any) -> NoReturn:
        raise DataError(
            f"a batch is of type {type(batch).__name__}. Let the dataset or collate_fn return a "
            "tensor, a tuple "
            "such as (inputs, labels), or a dict of tensors."
        )
