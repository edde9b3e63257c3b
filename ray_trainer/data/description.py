"""A dataset in a few words and numbers, kept beside its fingerprint: enough to say what differs from another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from ray_trainer.data.fingerprint import fingerprint

_MAX_COLUMNS = 200  # what is more is covered by the fingerprint alone


class ColumnDescription(NamedTuple):
    """One column, or one field of a sample.

    Attributes:
        form: type and shape of a row.
        content: a hash of what was looked at, the same rows for the same number of samples; empty if unknown.
    """

    form: str
    content: str = ""


@dataclass(frozen=True)
class DataDescription:
    """What is told of a dataset.

    Attributes:
        kind: what it is and how it is read, for a message.
        num_samples: None where nobody knows.
        columns: by name.
    """

    kind: str
    num_samples: int | None
    columns: Mapping[str, ColumnDescription] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any) -> Self:
        """Of a source, reader or dataset: what it says itself by ``describe()``, else type and length."""
        describe = getattr(data, "describe", None)
        if describe is not None:
            told = describe()
            return cls(told.kind, told.num_samples, dict(list(told.columns.items())[:_MAX_COLUMNS]))
        return cls(type(data).__qualname__, getattr(data, "num_samples", None))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        columns = {name: ColumnDescription(*parts) for name, parts in document["columns"].items()}
        return cls(document["kind"], document["num_samples"], columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        columns = {name: list(column) for name, column in self.columns.items()}
        return {"kind": self.kind, "num_samples": self.num_samples, "columns": columns}

    def resized(self, num_samples: int) -> "DataDescription":
        """The same data with another number of samples."""
        return replace(self, num_samples=num_samples)

    def differences(self, now: "DataDescription") -> list[str]:
        """What is different now, as the parts of a sentence; never empty."""
        found = []
        if self.num_samples != now.num_samples:
            found.append(f"{_count(self.num_samples)} samples before, {_count(now.num_samples)} now")
        if self.kind != now.kind:
            found.append(f"it was {self.kind} and is {now.kind}")
        found += [f"column {name!r} is gone" for name in self.columns if name not in now.columns]
        found += [f"column {name!r} is new" for name in now.columns if name not in self.columns]
        both = [(name, old, now.columns[name]) for name, old in self.columns.items() if name in now.columns]
        forms = [(name, old.form, new.form) for name, old, new in both]
        found += [f"column {name!r} was {old} and is {new}" for name, old, new in forms if old != new]
        if not found or self.num_samples == now.num_samples:
            found += [f"the content of column {name!r} differs" for name, old, new in both if _has_changed(old, new)]
        return found or ["its content differs"]


def is_of_content(difference: str) -> bool:
    """Whether one of `DataDescription.differences` is of values alone, not of their number or form."""
    return difference.endswith("content differs") or difference.startswith("the content of column ")


def describe_fields(samples: Sequence[Any]) -> dict[str, ColumnDescription]:
    """The fields of samples that are dicts or tuples, by key or place; of one of another kind, itself."""
    first = samples[0]
    if isinstance(first, Mapping):
        keys = [key for key in first if all(isinstance(sample, Mapping) and key in sample for sample in samples)]
        columns = {str(key): [sample[key] for sample in samples] for key in keys}
    elif isinstance(first, tuple | list):
        width = min(len(sample) if isinstance(sample, tuple | list) else 0 for sample in samples)
        columns = {str(place): [sample[place] for sample in samples] for place in range(width)}
    else:
        columns = {"sample": list(samples)}
    return {name: ColumnDescription(form_of(values[0]), fingerprint(values)) for name, values in columns.items()}


def form_of(value: Any) -> str:
    """Type, and shape where there is one."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _has_changed(old: ColumnDescription, new: ColumnDescription) -> bool:
    return old.form == new.form and old.content != new.content and bool(old.content and new.content)


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"
