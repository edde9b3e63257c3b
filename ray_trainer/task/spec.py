"""TaskSpec: a task, described independently of model and data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ray_trainer.errors import ConfigError
from ray_trainer.task.kinds import LOSS_ALIASES, TASK_ALIASES, TASK_KINDS, TaskKind, kind_of
from ray_trainer.task.spec_errors import did_you_mean, spec_errors


@dataclass
class TaskSpec:
    """A task: what goes into the model, what should come out, and how it is judged.

    What is left empty is filled in by the task type at construction. Like all configuration it is
    checked by `validate` only.

    Attributes:
        name: for logs and reports.
        task_type: a key of `TASK_KINDS` or an alias.
        model_family: 'decoder_only', 'encoder_only', 'encoder_decoder', or your own word. An 'encoder_only'
            language model sees both sides of a token, so its labels are not shifted.
        input_fields: fields of a batch that go into the model, in the order of its forward's parameters. An
            'attention_mask' may be absent from the batch or from forward; the others must be there.
        target_field: field with the labels; may be one of the inputs as well.
        loss_type: a registered loss; overrides that of the task type.
        metrics: what is measured besides the loss: 'accuracy', 'mae', 'perplexity'. ``["loss"]`` for nothing.
        special_tokens: token ids by role. 'pad_token_id' (or 'pad') is ignored in labels where no
            attention mask decides; the other roles are for collators.
        additional_config: 'shift_labels' (bool, lm), 'num_classes' (int), 'class_weights' (one per class).
        modality: 'text', 'vision', 'audio' or 'tabular'; chooses the collator.
        input_schema: field -> {'dtype', 'shape', 'min', 'max'}, checked against the first batch. The shape is
            that of one sample, None in it for any size.
        output_schema: 'num_classes' or 'vocab_size': the range that labels are checked against.
    """

    name: str
    task_type: str
    model_family: str = ""
    input_fields: list[str] = field(default_factory=list)
    target_field: str = "labels"
    loss_type: str = ""
    metrics: list[str] = field(default_factory=list)
    special_tokens: dict[str, int] = field(default_factory=dict)
    additional_config: dict[str, Any] = field(default_factory=dict)
    modality: str = ""
    input_schema: dict[str, dict[str, Any]] = field(default_factory=dict)
    output_schema: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = kind_of(self.task_type) if isinstance(self.task_type, str) else None
        if kind is not None:
            self.loss_type = self.loss_type or kind.losses[0]
            self.metrics = self.metrics or list(kind.metrics)
            self.modality = self.modality or kind.modality
            if not self.input_fields:
                self.input_fields = [name for name in kind.input_fields if name != self.target_field]

    def validate(self) -> bool:
        """Return True, or raise a `ConfigError` that lists everything that is wrong."""
        errors = spec_errors(self)
        if errors:
            lines = "\n".join(f"  - {error}" for error in errors)
            raise ConfigError(f"Task specification {self.name!r} cannot be used:\n{lines}")
        return True

    @property
    def kind(self) -> TaskKind:
        """What the task type means."""
        return TASK_KINDS[TASK_ALIASES.get(self.task_type, self.task_type)]

    @property
    def task_name(self) -> str:
        """The name, as the original called it."""
        return self.name

    @property
    def loss_name(self) -> str:
        """The registered name of the loss."""
        return self.kind.losses[0] if self.loss_type in LOSS_ALIASES else self.loss_type

    @property
    def shifts_labels(self) -> bool:
        """Whether a position is judged by the next token."""
        return bool(self.additional_config.get("shift_labels", self.model_family != "encoder_only"))

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, None where the task has none."""
        return self.special_tokens.get("pad_token_id", self.special_tokens.get("pad"))

    @property
    def num_classes(self) -> int | None:
        """How many classes or tokens a label may name, None where that is not said."""
        for source in (self.additional_config, self.output_schema):
            for key in ("num_classes", "vocab_size"):
                if key in source:
                    return int(source[key])
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TaskSpec":
        """Build from plain values; unknown and missing fields are errors, values are left to `validate`."""
        known = [entry.name for entry in fields(cls)]
        errors = [
            f"there is no field {key!r}{did_you_mean(key, known)}. Known: {', '.join(known)}."
            for key in data
            if key not in known
        ]
        errors += [f"{key!r} is missing." for key in ("name", "task_type") if key not in data]
        if errors:
            lines = "\n".join(f"  - {error}" for error in errors)
            raise ConfigError(f"Task specification {data.get('name')!r} cannot be used:\n{lines}")
        values = {key: _copied(value) for key, value in data.items() if value is not None}
        return cls(**values)

    @classmethod
    def lm_tiny(cls) -> "TaskSpec":
        """Next-token prediction with padding token 0."""
        return cls("lm_tiny", "lm", "decoder_only", special_tokens={"pad_token_id": 0})

    @classmethod
    def cls_tiny(cls) -> "TaskSpec":
        """Text classification into two classes."""
        return cls("cls_tiny", "text_classification", "encoder_only", additional_config={"num_classes": 2})

    @classmethod
    def seq2seq_tiny(cls) -> "TaskSpec":
        """An encoder and a decoder that is fed the shifted labels; padding token 0."""
        return cls("seq2seq_tiny", "seq2seq", "encoder_decoder", special_tokens={"pad_token_id": 0})

    @classmethod
    def vision_tiny(cls) -> "TaskSpec":
        """Image classification into ten classes."""
        return cls("vision_tiny", "vision_classification", "cnn", additional_config={"num_classes": 10})


def get_default_task_specs() -> dict[str, TaskSpec]:
    """Return the four small specifications to start from, by name."""
    specs = (TaskSpec.lm_tiny(), TaskSpec.cls_tiny(), TaskSpec.seq2seq_tiny(), TaskSpec.vision_tiny())
    return {spec.name: spec for spec in specs}


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value
