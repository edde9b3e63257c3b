"""The closed set of task types: what each one minimises, measures and takes as labels."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskKind:
    """What all tasks of one type have in common."""

    losses: tuple[str, ...]
    """Built-in losses that fit, by registry name; the first is the default."""
    metrics: tuple[str, ...]
    labels: Literal["tokens", "classes", "flags", "numbers"]
    """Class number per token or per sample, 0..1 per class, or any number."""
    modality: Literal["text", "vision", "audio", "tabular"]
    input_fields: tuple[str, ...]


_TEXT = ("input_ids", "attention_mask")

TASK_KINDS: dict[str, TaskKind] = {
    "lm": TaskKind(
        ("language_modeling", "causal_lm", "cross_entropy"),
        ("loss", "perplexity", "accuracy"),
        "tokens",
        "text",
        _TEXT,
    ),
    "seq2seq": TaskKind(
        ("seq2seq", "cross_entropy"),
        ("loss", "perplexity", "accuracy"),
        "tokens",
        "text",
        (*_TEXT, "decoder_input_ids"),
    ),
    "classification": TaskKind(
        ("classification", "text_classification", "tabular_classification", "cross_entropy"),
        ("loss", "accuracy"),
        "classes",
        "text",
        _TEXT,
    ),
    "text_classification": TaskKind(
        ("text_classification", "classification", "cross_entropy"),
        ("loss", "accuracy"),
        "classes",
        "text",
        _TEXT,
    ),
    "tabular_classification": TaskKind(
        ("tabular_classification", "classification", "cross_entropy"),
        ("loss", "accuracy"),
        "classes",
        "tabular",
        ("features",),
    ),
    "vision_classification": TaskKind(
        ("vision_classification", "cross_entropy"),
        ("loss", "accuracy"),
        "classes",
        "vision",
        ("pixel_values",),
    ),
    "segmentation": TaskKind(
        ("segmentation", "cross_entropy"), ("loss", "accuracy"), "classes", "vision", ("pixel_values",)
    ),
    "multilabel": TaskKind(("multilabel", "bce"), ("loss", "accuracy"), "flags", "text", _TEXT),
    "vision_multilabel": TaskKind(
        ("vision_multilabel", "multilabel", "bce"), ("loss", "accuracy"), "flags", "vision", ("pixel_values",)
    ),
    "regression": TaskKind(("regression", "mse", "l1", "huber"), ("loss", "mae"), "numbers", "tabular", ("features",)),
}

TASK_ALIASES = {
    "language_modeling": "lm",
    "causal_lm": "lm",
    "sequence_to_sequence": "seq2seq",
    "image_classification": "vision_classification",
    "image_segmentation": "segmentation",
    "multi_label": "multilabel",
    "tabular_regression": "regression",
}

LOSS_ALIASES = ("cross_entropy", "bce")
"""Names of a loss that mean "the one of this kind that fits the task type"."""

MODALITIES = ("text", "vision", "audio", "tabular")


def kind_of(task_type: str) -> TaskKind | None:
    """Return what a task type, or an alias of one, means; None for an unknown one."""
    return TASK_KINDS.get(TASK_ALIASES.get(task_type, task_type))
