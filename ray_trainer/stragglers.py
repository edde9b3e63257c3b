"""Ranks that are slower than the others, from the times by phase that ride on each step's exchange."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ray_trainer.pulse import COMPARED

WINDOW_STEPS = 20
#: Windows in a row in which a rank must be slow before it is named, or not slow before it may be named again.
PERSISTENT_WINDOWS = 3
SLOW_RATIO = 1.5
#: The time a slow rank takes longer than the others must be so much of the step, or it does not matter.
LEAST_SHARE = 0.1
MOST_NAMED = 20


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow for a while.

    Attributes:
        rank: which.
        ratio: its own time a step, in relation to the median of the other ranks.
        phase: where it loses most of it.
        excess_s: what it takes longer, a step.
    """

    rank: int
    ratio: float
    phase: str
    excess_s: float


class StragglerWatch:
    """Takes what the ranks exchange at each step. The first step is left out: it compiles and loads."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._seconds = 0.0
        self._steps = -1
        self._streaks: dict[int, int] = {}
        self._named: set[int] = set()
        self._num_named = 0

    def add(self, own_times: torch.Tensor, seconds: float) -> list[Straggler]:
        """One more step; the ranks that are to be named now.

        Args:
            own_times: ``(ranks, len(COMPARED))``, seconds.
            seconds: of the whole step.
        """
        self._steps += 1
        if self._steps == 0:
            return []
        self._sums = own_times if self._sums is None else self._sums + own_times
        self._seconds += seconds
        if self._steps < WINDOW_STEPS:
            return []
        slow = find_slow(self._sums.tolist(), self._seconds, self._steps)
        self._sums, self._seconds, self._steps = None, 0.0, 0
        return self._persistent(slow)

    def _persistent(self, slow: dict[int, Straggler]) -> list[Straggler]:
        for rank in {*slow, *self._streaks}:
            before = self._streaks.get(rank, 0)
            self._streaks[rank] = max(before, 0) + 1 if rank in slow else min(before, 0) - 1
        lasting = {rank for rank, streak in self._streaks.items() if streak >= PERSISTENT_WINDOWS}
        over = {rank for rank, streak in self._streaks.items() if streak <= -PERSISTENT_WINDOWS}
        self._streaks = {rank: streak for rank, streak in self._streaks.items() if rank not in over}
        found = sorted(lasting - self._named)[: MOST_NAMED - self._num_named]
        self._named = (self._named | lasting) - over
        self._num_named += len(found)
        return [slow[rank] for rank in found]


def find_slow(own_times: Sequence[Sequence[float]], seconds: float, steps: int) -> dict[int, Straggler]:
    """The slow ones of several ranks.

    Args:
        own_times: of each rank, by phase, over a number of steps.
        seconds: that those steps took in all.
        steps: how many.
    """
    totals = [sum(times) for times in own_times]
    slow = {}
    for rank, total in enumerate(totals):
        usual = median([*totals[:rank], *totals[rank + 1 :]])
        if total <= SLOW_RATIO * usual or total - usual < LEAST_SHARE * seconds:
            continue
        others = [*own_times[:rank], *own_times[rank + 1 :]]
        excess = [own - median(column) for own, column in zip(own_times[rank], zip(*others, strict=True), strict=True)]
        phase = COMPARED[excess.index(max(excess))].name.lower()
        slow[rank] = Straggler(rank, total / max(usual, 1e-9), phase, (total - usual) / steps)
    return slow
