"""Curves as what a template draws: points in a box of fixed size, with ticks. Many points become few."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_trainer.report.data import Row, finite
from ray_trainer.report.units import readable_number

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 392, 10, 196
MAX_CHARTS = 40
_BUCKETS = 250
_MOST_MARKS = 50
_LARGEST = 1e150  # beyond, spans overflow
_NOT_METRICS = ("step", "epoch", "time", "attempt")
_SPEED = ("samples_per_s", "data_wait_s")

Point = tuple[float, float | None]  # step, value; None where the value is no finite number


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        split: ``train`` or ``val``.
        segments: points as SVG writes them; more than one where a value in between is not finite.
        last: its last value, for people.
        num_missing: how many values are not finite.
    """

    split: str
    segments: list[str]
    last: str
    num_missing: int


@dataclass(frozen=True)
class Chart:
    """One metric over the steps.

    Attributes:
        x_ticks: place and label.
        y_ticks: place and label.
        marks: places of steps at which the run was resumed or rolled back.
    """

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float] = field(default_factory=list)


def metric_names(rows: Iterable[Row]) -> list[str]:
    """What was measured, the loss first; without what is no metric and without speed."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(name for name in row if name not in names and _is_metric(row, name)))
    return sorted(names, key=lambda name: name != "loss")


def charts(names: Iterable[str], rows: Sequence[Row], marked_steps: Iterable[int] = ()) -> list[Chart]:
    """A chart for each name with at least one finite value."""
    marked = list(marked_steps)
    drawn = (_chart(name, rows, marked) for name in names)
    return [chart for chart in drawn if chart]


def speed_names() -> tuple[str, ...]:
    """The columns that tell how fast training goes."""
    return _SPEED


def thinned(points: Sequence[Point], num_buckets: int = _BUCKETS) -> list[Point]:
    """At most two points a bucket of steps: the lowest and the highest, in their order. Few points stay as they are."""
    if len(points) <= 2 * num_buckets:
        return list(points)
    start, end = points[0][0], points[-1][0]
    buckets: dict[int, list[Point]] = {}
    for point in points:
        place = min(num_buckets - 1, int((point[0] - start) / (end - start) * num_buckets))
        buckets.setdefault(place, []).append(point)
    kept: list[Point] = []
    for bucket in buckets.values():
        known = [point for point in bucket if point[1] is not None]
        ends = {min(known, key=_value), max(known, key=_value)} if known else {bucket[0]}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        round(place * step, 12) if abs(step) > 1e-9 else place * step
        for place in range(first, first + most + 2)
        if place * step <= high + step * 1e-9
    ]


def _chart(name: str, rows: Sequence[Row], marked: Sequence[int]) -> Chart | None:
    points = {split: _points(name, split, rows) for split in ("train", "val")}
    values = [value for line in points.values() for _, value in line if value is not None]
    if not values:
        return None
    steps = [step for line in points.values() for step, _ in line]
    x_low, x_high = _widened(min(steps), max(steps))
    y_low, y_high = _widened(min(values), max(values))
    x = _scale(x_low, x_high, LEFT, RIGHT)
    y = _scale(y_low, y_high, BOTTOM, TOP)
    inside = sorted({round(x(step), 0) for step in marked if x_low <= step <= x_high})
    return Chart(
        title=name,
        lines=[_line(split, line, x, y) for split, line in points.items() if any(v is not None for _, v in line)],
        x_ticks=[(x(tick), readable_number(tick)) for tick in nice_ticks(x_low, x_high, 4)],
        y_ticks=[(y(tick), f"{tick:.4g}") for tick in nice_ticks(y_low, y_high)],
        marks=inside[:: 1 + len(inside) // _MOST_MARKS],
    )


def _points(name: str, split: str, rows: Sequence[Row]) -> list[Point]:
    return [(float(row["step"]), _drawable(row[name])) for row in rows if row["split"] == split and name in row]


def _drawable(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else max(-_LARGEST, min(_LARGEST, number))


def _line(split: str, points: list[Point], x: Callable[[float], float], y: Callable[[float], float]) -> Line:
    segments: list[list[str]] = [[]]
    for step, value in thinned(points):
        if value is not None:
            segments[-1].append(f"{x(step):.1f},{y(value):.1f}")
        elif segments[-1]:
            segments.append([])
    known = [value for _, value in points if value is not None]
    # a single point is drawn as a line to itself, whose round ends make it a dot
    drawn = [" ".join(segment * 2 if len(segment) == 1 else segment) for segment in segments if segment]
    return Line(split, drawn, f"{known[-1]:.4g}", len(points) - len(known))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A span that is not empty, and wide enough to be divided."""
    if high - low > 1e-9 * max(abs(low), abs(high)) and high - low > 1e-290:
        return low, high
    room = max(abs(low), abs(high)) * 0.1 or 1.0
    room = max(room, 1e-280)
    return low - room, high + room


def _is_metric(row: Row, name: str) -> bool:
    is_known = name in _NOT_METRICS or name in _SPEED
    return not is_known and (row[name] is None or finite(row[name]) is not None or isinstance(row[name], float))


def _value(point: Point) -> float:
    return point[1] if point[1] is not None else math.nan
