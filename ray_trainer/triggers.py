"""When something happens: small values that combine, ``EverySteps(100) | EveryMinutes(10)``."""

import math
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Moment:
    """Where a run is when a trigger is asked. Equal on all ranks, its clock included.

    Attributes:
        step: completed steps of the run.
        epoch: the epoch that the last completed step belongs to.
        is_epoch_end: that step was the epoch's last.
        idle_s: seconds since the thing in question happened last, or since the start.
    """

    step: int
    epoch: int
    is_epoch_end: bool
    idle_s: float


class Trigger(Protocol):
    """A pure question about a moment."""

    def due(self, moment: Moment) -> bool:
        """Whether it is time."""


@dataclass(frozen=True)
class AnyOf:
    """Due when one of its triggers is; never, without any."""

    triggers: tuple[Trigger, ...] = ()

    def due(self, moment: Moment) -> bool:
        """See `Trigger`."""
        return any(trigger.due(moment) for trigger in self.triggers)


class _Combinable:
    def __or__(self, other: Trigger) -> AnyOf:
        return AnyOf((self, other))  # type: ignore[arg-type]  # every subclass is a Trigger


@dataclass(frozen=True)
class EverySteps(_Combinable):
    """At each step that ``n`` divides."""

    n: int

    def due(self, moment: Moment) -> bool:
        """See `Trigger`."""
        return moment.step > 0 and moment.step % self.n == 0


@dataclass(frozen=True)
class EveryEpochs(_Combinable):
    """At the end of each ``n``-th epoch."""

    n: int

    def due(self, moment: Moment) -> bool:
        """See `Trigger`."""
        return moment.is_epoch_end and (moment.epoch + 1) % self.n == 0


@dataclass(frozen=True)
class EveryMinutes(_Combinable):
    """When it was ``minutes`` ago or more; on several ranks by one agreed clock."""

    minutes: float

    def due(self, moment: Moment) -> bool:
        """See `Trigger`."""
        return moment.idle_s >= self.minutes * 60


class AffordableInterval:
    """As often as a budget of time allows, as CheckFreq does (Mohan et al., FAST '21).

    Once a run has failed, the interval of Young (1974) and Daly (2006) takes the place of the budget: the
    square root of 2 x cost x mean time between failures, which loses the least time altogether.
    """

    #: Before the cost of a checkpoint is known.
    FIRST_S = 60.0

    def __init__(self, budget: float) -> None:
        """Start from nothing.

        Args:
            budget: part of the time of training that checkpoints may cost.
        """
        self._budget = budget
        self.interval_s = self.FIRST_S

    def due(self, moment: Moment) -> bool:
        """See `Trigger`."""
        return moment.step > 0 and moment.idle_s >= self.interval_s

    def learn(self, cost_s: float, num_failures: int, elapsed_s: float) -> None:
        """Take account of a checkpoint.

        Args:
            cost_s: for how long it stopped training; equal on all ranks, as all else.
            num_failures: of the run up to now.
            elapsed_s: time of training up to now.
        """
        self.interval_s = cost_s / self._budget
        if num_failures:
            self.interval_s = math.sqrt(2 * cost_s * elapsed_s / num_failures)


class Backoff:
    """When to try again what failed: after a pause, which doubles with each failure in a row.

    Attributes:
        failures: in a row.
    """

    FIRST_S = 5.0
    LONGEST_S = 300.0

    def __init__(self) -> None:
        self.failures = 0
        self._due_at_s = math.inf

    def due(self, now_s: float) -> bool:
        """Whether it is time for the next attempt."""
        return now_s >= self._due_at_s

    def begin(self) -> None:
        """Take note of an attempt: none is due until it has failed."""
        self._due_at_s = math.inf

    def fail(self, now_s: float) -> None:
        """Take note of an attempt that failed."""
        self.failures += 1
        self._due_at_s = now_s + min(self.LONGEST_S, self.FIRST_S * 2 ** (self.failures - 1))

    def succeed(self) -> None:
        """Take note of one that did not."""
        self.failures = 0
        self._due_at_s = math.inf


def any_of(
    *,
    steps: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    other: Trigger | None = None,
) -> AnyOf:
    """The triggers of those intervals that are set."""
    triggers: list[Trigger] = [] if other is None else [other]
    if steps is not None:
        triggers.append(EverySteps(steps))
    if epochs is not None:
        triggers.append(EveryEpochs(epochs))
    if minutes is not None:
        triggers.append(EveryMinutes(minutes))
    return AnyOf(tuple(triggers))


class EarlyStopping:
    """Stop when a metric has not improved for ``patience`` validations in a row.

    A value that is not a number is no improvement. Without a patience it never stops.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0, mode: str = "min") -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._sign = 1.0 if mode == "min" else -1.0
        self._best = math.inf
        self._failures = 0

    def should_stop(self, value: float) -> bool:
        """Count one validation; whether patience ran out with it."""
        if self._sign * value < self._best - self._min_delta:
            self._best = self._sign * value
            self._failures = 0
        else:
            self._failures += 1
        return self._patience is not None and self._failures >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """Best value so far (signed so that less is better) and validations since."""
        return {"best": self._best, "failures": self._failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._best = state_dict["best"]
        self._failures = state_dict["failures"]
