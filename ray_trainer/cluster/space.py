"""Search spaces: what a sweep may try. Does not import Ray.

A domain is written the same way in Python and in a run file, as ``{"loguniform": [1e-4, 1e-1]}``; the functions
here are that notation with a name.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Notation = dict[str, Any]
"""A domain as it stands in a run file."""


@dataclass(frozen=True)
class Domain:
    """The values of one setting.

    Attributes:
        kind: one of `KINDS`.
        values: what there is to choose from, or the two bounds.
    """

    kind: str
    values: tuple[Any, ...]

    @property
    def is_listed(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in ("choice", "grid")

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1); places that are spread evenly give the domain's distribution."""
        if self.is_listed:
            return self.values[int(place * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return low + int(place * (high - low))
        if self.kind == "uniform":
            return low + place * (high - low)
        return min(high, max(low, math.exp(math.log(low) + place * (math.log(high) - math.log(low)))))

    def clamp(self, value: Any) -> Any:
        """The nearest value within the bounds; listed values are left alone."""
        if self.is_listed:
            return value
        low, high = self.values
        return min(max(value, low), high - 1) if self.kind == "randint" else min(max(value, low), high)

    def extremes(self) -> tuple[Any, ...]:
        """Values that must be allowed if all are."""
        if self.kind == "randint":
            return self.values[0], self.values[1] - 1
        return self.values


def choice(values: Iterable[Any]) -> Notation:
    """One of these, each as likely as another."""
    return {"choice": list(values)}


def grid(values: Iterable[Any]) -> Notation:
    """Each of these, crossed with the other grids; all else is drawn anew for each point."""
    return {"grid": list(values)}


def uniform(low: float, high: float) -> Notation:
    """A number between the bounds."""
    return {"uniform": [low, high]}


def loguniform(low: float, high: float) -> Notation:
    """A number between the bounds, each order of magnitude as likely as another."""
    return {"loguniform": [low, high]}


def randint(low: int, high: int) -> Notation:
    """A whole number from ``low`` to ``high - 1``, as Python's ``range`` and Ray Tune have it."""
    return {"randint": [low, high]}


def _listed(values: Sequence[Any]) -> str | None:
    if not values:
        return "holds no value; list at least one"
    seen: list[Any] = []
    for value in values:
        if any(value == other and type(value) is type(other) for other in seen):
            return f"holds {value!r} twice; list each value once"
        seen.append(value)
    return None


def _bounds(values: Sequence[Any]) -> str | None:
    if len(values) != 2 or not all(_is_number(value) for value in values):
        return "must be two numbers, [low, high]"
    if values[0] >= values[1]:
        return f"has the bounds {values[0]:g} and {values[1]:g}; the lower one comes first and they differ"
    return None


def _log_bounds(values: Sequence[Any]) -> str | None:
    problem = _bounds(values)
    if problem is None and values[0] <= 0:
        return f"starts at {values[0]:g}; a logarithmic range needs a lower bound above 0"
    return problem


def _whole_bounds(values: Sequence[Any]) -> str | None:
    if len(values) != 2 or not all(type(value) is int for value in values):
        return "must be two whole numbers, [low, high), of which the upper one is left out"
    return _bounds(values)


#: Kind of domain -> what is wrong with its values, if anything.
KINDS: Mapping[str, Callable[[Sequence[Any]], str | None]] = {
    "choice": _listed,
    "grid": _listed,
    "uniform": _bounds,
    "loguniform": _log_bounds,
    "randint": _whole_bounds,
}


def domain_problem(notation: object) -> str | None:
    """What is wrong with how a domain is written, and what to write; None if it is right."""
    example = "write one of {choice: [...]}, {grid: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, "
    example += "{randint: [low, high]}"
    if not isinstance(notation, Mapping) or len(notation) != 1:
        return example
    ((kind, values),) = notation.items()
    if kind not in KINDS:
        return f"there is no {kind!r}; {example}"
    if not isinstance(values, list | tuple):
        return f"{kind} takes a list; {example}"
    problem = KINDS[kind](values)
    return problem and f"{kind} {problem}"


def read_domain(notation: Mapping[str, Any]) -> Domain:
    """The domain that a notation without problems means."""
    ((kind, values),) = notation.items()
    return Domain(kind, tuple(values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
