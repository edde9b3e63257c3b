"""Whether two runs are equal to the bit: their last state, and every row of their metrics once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ray_trainer.checkpoint.catalog import list_checkpoints
from ray_trainer.checkpoint.restore import load_named
from ray_trainer.metrics.jsonl import Row, read_rows
from ray_trainer.storage import Storage

#: What is a time, and differs from run to run.
_TIMES = {"time", "samples_per_s", "data_wait_s", "elapsed_s", "epoch_elapsed_s", "epoch_duration"}


@dataclass(frozen=True)
class Comparison:
    """What was compared and what was found.

    Attributes:
        num_tensors: of the model, the optimizer and everything else that a checkpoint keeps.
        num_rows: of metrics.
        differences: each in a line, the earliest first; none if the runs are equal.
        first_step: at which the metrics differ for the first time; None if they don't.
    """

    num_tensors: int
    num_rows: int
    differences: tuple[str, ...]
    first_step: int | None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def compare_runs(one: Storage, other: Storage) -> Comparison:
    """Hold a run against one that should be equal to it.

    Raises:
        CheckpointCorruptError: a newest checkpoint can't be read.
    """
    rows = _rows(one)
    in_rows = list(_row_differences(rows, _rows(other)))
    num_tensors, in_state = _compare_states(one, other)
    steps = [step for step, _ in in_rows]
    return Comparison(
        num_tensors=num_tensors,
        num_rows=len(rows),
        differences=(*(text for _, text in in_rows), *in_state),
        first_step=min(steps, default=None),
    )


def _rows(run: Storage) -> list[Row]:
    rows = read_rows(run, "metrics.jsonl")
    return sorted(rows, key=lambda row: (row["step"], row["split"]))


def _row_differences(ones: list[Row], others: list[Row]) -> Iterator[tuple[int, str]]:
    """Each with its step, in the order of steps."""
    left, right = (Counter((row["step"], row["split"]) for row in rows) for rows in (ones, others))
    by_place = ({(row["step"], row["split"]): row for row in rows} for rows in (ones, others))
    here, there = by_place
    for place in sorted(left | right):
        step, split = place
        if (left[place], right[place]) != (1, 1):
            yield step, f"{split} metrics of step {step} stand {left[place]} and {right[place]} times"
            continue
        for path, mine, theirs in _unequal(here[place], there[place], ""):
            yield step, f"{split} {path} of step {step} is {_short(mine)} and {_short(theirs)}"


def _compare_states(one: Storage, other: Storage) -> tuple[int, list[str]]:
    newest = [list_checkpoints(run)[-1:] for run in (one, other)]
    if not all(newest):
        return 0, ["there is no checkpoint to compare"]
    mine, theirs = newest[0][0], newest[1][0]
    if (mine.step, mine.epoch) != (theirs.step, theirs.epoch):
        return 0, [f"the newest checkpoint is of step {mine.step} and of step {theirs.step}"]
    state = load_named(one.child(mine.name)).state
    differences = [
        f"{path} of the state after step {mine.step} is {_short(value)} and {_short(counterpart)}"
        for path, value, counterpart in _unequal(state, load_named(other.child(theirs.name)).state, "")
    ]
    return sum(1 for value in _leaves(state) if isinstance(value, torch.Tensor)), differences


def _unequal(one: Any, other: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The places at which two nested values differ, but for times, with what is there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if key not in _TIMES:
                yield from _unequal(one.get(key, _NOTHING), other.get(key, _NOTHING), f"{path}.{key}".lstrip("."))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _unequal(left, right, f"{path}[{place}]")
    elif not _same_bits(one, other):
        yield path, one, other


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return bool(type(one) is type(other) and (one == other or (one != one and other != other)))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _short(value: Any) -> str:
    if value is _NOTHING:
        return "missing"
    if isinstance(value, torch.Tensor):
        first = ", ".join(f"{number:.9g}" for number in value.reshape(-1)[:2].tolist())
        return f"{first}, ..." if value.numel() > 2 else first
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


_NOTHING = object()
