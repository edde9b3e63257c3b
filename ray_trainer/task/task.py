"""Task: one batch through the model, and what came of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ray_trainer.errors import ConfigError
from ray_trainer.losses import (
    AligningLoss,
    LanguageModelingLoss,
    LossInputs,
    LossResult,
    LossStrategy,
    LossStrategyRegistry,
    ModelOutput,
    aligns,
    explain_loss_error,
)
from ray_trainer.losses.registry import BUILT_IN
from ray_trainer.task.batches import Batch, BatchReader
from ray_trainer.task.checks import check_same_rows, check_schema, check_target, check_tensor
from ray_trainer.task.explain import explain_forward_error
from ray_trainer.task.spec import TaskSpec

ReadColumn = Callable[[Any], Iterable[Tensor]]


class BatchResult(NamedTuple):
    """What one batch contributes; everything can be added up over batches and workers."""

    loss: LossResult
    metrics: tuple[tuple[Tensor, Tensor | int], ...]
    """(sum, count) for each of `Task.metric_names`, detached."""


class Task:
    """What a batch means for a model: which part goes in, what it is compared with, what is measured.

    Args:
        spec: None for language modelling.
        model: the bare model; only its forward's signature is read.
        loss: without an `align` of its own, metrics come from the loss that fits the task type.
        pad_token_id: of the model; that of the spec wins over it.

    Attributes:
        metric_names: of the metrics in each `BatchResult`.
        has_perplexity: whether exp(mean loss) is to be reported as perplexity.
    """

    def __init__(
        self, spec: TaskSpec | None, model: nn.Module, loss: LossStrategy, pad_token_id: int | None = None
    ) -> None:
        if spec is not None:
            spec.validate()
        self._spec = spec
        self._model = model
        self._loss = loss
        self._own: AligningLoss | None = loss if aligns(loss) else None
        self._yardstick = self._own or (_built_in_loss(spec, spec.kind.losses[0]) if spec else None)
        wanted = self._yardstick.metric if self._yardstick is not None else ""
        measures = bool(wanted) and (spec is None or wanted in spec.metrics)
        self.metric_names: tuple[str, ...] = (wanted,) if measures else ()
        self.has_perplexity: bool = getattr(loss, "has_perplexity", False) and (
            spec is None or "perplexity" in spec.metrics
        )
        own_pad = spec.pad_token_id if spec else None
        self._pad_token_id = pad_token_id if own_pad is None else own_pad
        self._reader = BatchReader(spec, model, labels_from_inputs=getattr(loss, "has_perplexity", False))

    def evaluate(self, forward: Callable[..., Any], batch: Batch) -> BatchResult:
        """Run one batch. Never waits for the device.

        Args:
            forward: the model, or what wraps it.
            batch: on the model's device.

        Raises:
            DataError: the batch does not fit the model or the task; names field, value and what to do.
        """
        args, kwargs, target, attention_mask = self._reader.read(batch)
        try:
            raw = forward(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError) as error:
            explanation = explain_forward_error(error, batch, self._model)
            if explanation is None:
                raise
            raise explanation from error
        return self._judge(
            {
                "logits": raw if isinstance(raw, Tensor) else ModelOutput.from_raw(raw).logits,
                "labels": target,
                "attention_mask": attention_mask,
                "pad_token_id": self._pad_token_id,
            }
        )

    def check_first_batch(self, batch: Batch) -> None:
        """Raise a `DataError` for what can be seen without running the model. Waits for the device."""
        spec, target_name = self._spec, self._reader.target_field
        target = self._reader.read(batch).target
        inputs = self._reader.named_inputs(batch)
        labels = spec.kind.labels if spec else ("tokens" if self.has_perplexity else "numbers")
        for name, value in inputs.items():
            check_tensor(name, value)
        check_target(target_name, target, labels, spec.num_classes if spec else None, self._pad_token_id)
        for name, value in inputs.items():
            check_same_rows(name, value, target_name, target)
        fields = {**inputs, target_name: target}
        for name, schema in (spec.input_schema if spec else {}).items():
            if name in fields:
                check_schema(name, fields[name], schema)

    def check_all_labels(self, forward: Callable[..., Any], batch: Batch, column: ReadColumn) -> None:
        """Raise a `DataError` for a label anywhere in the data that the model has no output for.

        Args:
            forward: the model; called once, to see how many classes it tells apart.
            batch: a first one.
            column: gives all values of a column of the data, by the place of it in a batch.
        """
        if not self._takes_class_numbers:
            return
        call = self._reader.read(batch)
        logits = ModelOutput.from_raw(forward(*call.args, **call.kwargs)).logits
        classes = logits.shape[1] if logits.dim() == 4 else logits.shape[-1]
        for labels in column(self._reader.target_key(batch)):
            check_target(self._reader.target_field, labels, "classes", classes, self._pad_token_id)

    @property
    def _takes_class_numbers(self) -> bool:
        return self.has_perplexity if self._spec is None else self._spec.kind.labels in ("tokens", "classes")

    def _judge(self, inputs: LossInputs) -> BatchResult:
        own = self._own
        if own is None:
            return self._judge_by_foreign_loss(inputs)
        aligned = own.align(inputs)
        try:
            loss = own.reduce(aligned)
        except (RuntimeError, IndexError) as error:
            explanation = explain_loss_error(error, aligned.logits, aligned.labels, self._reader.target_field)
            if explanation is None:
                raise
            raise explanation from error
        return BatchResult(loss, (own.measure(aligned),) if self.metric_names else ())

    def _judge_by_foreign_loss(self, inputs: LossInputs) -> BatchResult:
        loss = self._loss.compute_loss(inputs)
        if not isinstance(loss, LossResult):
            raise ConfigError(
                f"{type(self._loss).__name__}.compute_loss returned {type(loss).__name__}. Return "
                "LossResult(sum, "
                "count), with the loss summed over what counts, so that batches of unequal size add up."
            )
        if self._yardstick is None or not self.metric_names:
            return BatchResult(loss, ())
        return BatchResult(loss, (self._yardstick.measure(self._yardstick.align(inputs)),))


def loss_for(spec: TaskSpec | None, pad_token_id: int | None = None) -> LossStrategy:
    """Build the loss of a task: that of its loss_type, language modelling without a spec.

    Args:
        spec: its own padding token wins over `pad_token_id`.
        pad_token_id: of the model; for losses over tokens.
    """
    if spec is None:
        return LanguageModelingLoss(pad_token_id=pad_token_id)
    spec.validate()
    name = spec.loss_name
    return _built_in_loss(spec, name, pad_token_id) if name in BUILT_IN else LossStrategyRegistry.get(name)


def _built_in_loss(spec: TaskSpec, name: str, pad_token_id: int | None = None) -> Any:
    options: dict[str, Any] = {}
    if spec.kind.labels == "tokens":
        options["pad_token_id"] = pad_token_id if spec.pad_token_id is None else spec.pad_token_id
    if "class_weights" in spec.additional_config:
        options["class_weights"] = spec.additional_config["class_weights"]
    if spec.kind.losses[0] == "language_modeling":
        options["shift"] = spec.shifts_labels
    return LossStrategyRegistry.get(name, **options)
