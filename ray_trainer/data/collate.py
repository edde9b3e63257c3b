"""Making one batch of a list of samples, and choosing who does it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ray_trainer.data.samples import Collate
from ray_trainer.errors import DataError

IGNORED_LABEL = -100

CollatorFactory = Callable[..., Collate]


class HasModality(Protocol):
    """The part of a task that decides how its samples are put together."""

    @property
    def modality(self) -> str:
        """``text``, ``vision``, ``audio`` or ``tabular``."""
        ...


@dataclass(frozen=True)
class CollatorInfo:
    """An entry of the registry.

    Attributes:
        name: it is chosen by.
        factory: makes the collator; takes keywords such as ``tokenizer``, and ignores those it cannot use.
        modality: of the tasks it fits.
        description: one sentence.
    """

    name: str
    factory: CollatorFactory
    modality: str
    description: str


class CollatorRegistry:
    """Collators by name and by the modality of a task.

    A registry of its own is as good as the shared one; that is there for code that registers at import.
    """

    _shared: "CollatorRegistry | None" = None

    def __init__(self) -> None:
        self._collators: dict[str, CollatorInfo] = {}
        self.register("default", "tabular", "Stacks tensors and numbers of equal shape.")(_default_factory)
        self.register("vision", "vision", "Stacks images as pixel_values, with labels.")(_vision_factory)
        self.register("text", "text", "Pads token ids, masks the padding, ignores it in labels.")(_text_factory)
        self._built_in = frozenset(self._collators)

    @classmethod
    def get_instance(cls) -> "CollatorRegistry":
        """The shared registry of this process."""
        if cls._shared is None:
            cls._shared = cls()
        return cls._shared

    @classmethod
    def reset(cls) -> None:
        """Forget what was registered in the shared registry."""
        cls._shared = None

    def register(self, name: str, modality: str, description: str = "") -> Callable[[CollatorFactory], CollatorFactory]:
        """Decorator for a factory; replaces an entry of the same name, and is preferred for its modality."""

        def add(factory: CollatorFactory) -> CollatorFactory:
            self._collators.pop(name, None)
            self._collators[name] = CollatorInfo(name, factory, modality, description)
            return factory

        return add

    def get_collator(
        self, task_spec: HasModality | None = None, collator_name: str | None = None, **options: Any
    ) -> Collate:
        """The collator of that name, else the newest for the task's modality, else the default one.

        Args:
            task_spec: the task, if the name is left out.
            collator_name: wins over the task.
            options: for the factory, for example ``tokenizer``.

        Raises:
            ValueError: there is none of that name, or the factory refuses the options.
        """
        info = self._named(collator_name) if collator_name is not None else self.newest_for(task_spec)
        return info.factory(**options)

    def list_collators(self) -> list[CollatorInfo]:
        """All entries, the newest last."""
        return list(self._collators.values())

    def newest_for(self, task_spec: HasModality | None) -> CollatorInfo:
        """The entry that is chosen for a task; the default one if none fits."""
        modality = "tabular" if task_spec is None else task_spec.modality
        fitting = [info for info in self._collators.values() if info.modality == modality]
        return fitting[-1] if fitting else self._collators["default"]

    def is_built_in(self, info: CollatorInfo) -> bool:
        """Whether the entry is one of ours, and not replaced by the user."""
        return info.name in self._built_in and info.factory in (
            _default_factory,
            _vision_factory,
            _text_factory,
        )

    def _named(self, name: str) -> CollatorInfo:
        if name not in self._collators:
            raise ValueError(f"There is no collator {name!r}. There are: {', '.join(sorted(self._collators))}.")
        return self._collators[name]


class TextCollator:
    """Pads samples of tokens to the longest of the batch.

    Takes texts, ``{"text": ...}``, token ids, pairs of ids and labels, or dicts with ``input_ids``. Gives
    tensors ``input_ids``, ``attention_mask`` and ``labels`` ``(B, T)``, int64, and any further field of
    numbers. Labels that are missing are the ids themselves (the loss shifts them), with -100 where there is
    padding; one number a sample stays one number, ``(B,)``.

    Args:
        tokenizer: turns text into ids by being called, if there is text; its ``pad_token_id`` fills up, else
            its ``eos_token_id``, else 0.
        max_length: longer samples are cut.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
        self._pad_token_id = next(int(token) for token in candidates if token is not None)

    def __call__(self, samples: list[Any]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            DataError: a sample has no tokens, or another length of labels than of ids.
        """
        fields = [self._fields(sample) for sample in samples]
        names = [name for name in fields[0] if all(name in sample for sample in fields)]
        return {name: self._batched(name, [sample[name] for sample in fields]) for name in names}

    def _fields(self, sample: Any) -> dict[str, Tensor]:
        """One sample as tensors; all sequences as long as its ids."""
        raw = self._named(sample)
        numbers = {name: value for name, value in raw.items() if _is_numeric(value)}
        fields = {
            name: torch.as_tensor(value)[..., : self._max_length] if _is_long(value) else torch.as_tensor(value)
            for name, value in numbers.items()
        }
        ids = fields["input_ids"] = fields["input_ids"].long()
        mask = fields["attention_mask"] = fields.get("attention_mask", torch.ones_like(ids)).long()
        fields.setdefault("labels", ids.masked_fill(mask == 0, IGNORED_LABEL))
        for name, value in fields.items():
            if value.ndim == 1 and len(value) != len(ids):
                raise DataError(
                    f"A sample has {len(ids)} input_ids but {len(value)} {name}. They must be equally many."
                )
        return fields

    def _named(self, sample: Any) -> dict[str, Any]:
        if isinstance(sample, Mapping) and "input_ids" in sample:
            return dict(sample)
        if isinstance(sample, Mapping) and "text" in sample:
            return {**sample, **self._tokenized(sample["text"])}
        if isinstance(sample, str):
            return self._tokenized(sample)
        if isinstance(sample, tuple) and len(sample) == 2:
            return {**self._named(sample[0]), "labels": sample[1]}
        if isinstance(sample, (Tensor, Sequence)):
            return {"input_ids": sample}
        found = f"the keys {list(sample)}" if isinstance(sample, Mapping) else f"type {type(sample).__name__}"
        raise DataError(f"A sample has {found}. The text collator needs text, token ids, or a dict with input_ids.")

    def _tokenized(self, text: str) -> dict[str, Any]:
        encoded = self._tokenizer(text)
        return dict(encoded) if isinstance(encoded, Mapping) else {"input_ids": encoded}

    def _batched(self, name: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim != 1:
            return torch.stack(values)
        fill = {"input_ids": self._pad_token_id, "labels": IGNORED_LABEL}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def _text_factory(tokenizer: Any = None, max_length: int | None = None, **_: Any) -> Collate:
    if tokenizer is None:
        raise ValueError("tokenizer required for text collator: pass tokenizer=, or a collate_fn of your own.")
    return TextCollator(tokenizer, max_length)


def _vision_factory(**_: Any) -> Collate:
    return _collate_images


def _default_factory(**_: Any) -> Collate:
    return default_collate


def _collate_images(samples: list[Any]) -> Any:
    """Pairs of image and label as a dict; anything else as it is stacked by default."""
    if isinstance(samples[0], tuple) and len(samples[0]) == 2:
        images, labels = default_collate(samples)
        return {"pixel_values": images, "labels": labels}
    return default_collate(samples)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or value is None:
        return False
    if isinstance(value, Sequence):
        return all(isinstance(item, (int, float)) for item in value)
    return isinstance(value, (Tensor, int, float)) or hasattr(value, "__array__")


def _is_long(value: Any) -> bool:
    return not isinstance(value, (int, float)) and torch.as_tensor(value).ndim == 1
