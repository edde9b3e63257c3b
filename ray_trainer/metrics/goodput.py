"""Goodput: the share of a run's time that went into steps that count. Computed from its events alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, in seconds. The times add up to `total_s`.

    Attributes:
        useful_s: between the start of workers and the last step that was kept, without what follows.
        checkpoint_s: steps waited for checkpoints.
        lost_s: in steps that were done again, until the failure was noticed.
        down_s: without workers: they were started anew, or nobody gave the command again.
        paused_s: after somebody stopped the run, until it was continued. No part of the ratio.
    """

    useful_s: float = 0.0
    checkpoint_s: float = 0.0
    lost_s: float = 0.0
    down_s: float = 0.0
    paused_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From the first start of workers on, without pauses."""
        return self.useful_s + self.checkpoint_s + self.lost_s + self.down_s

    @property
    def ratio(self) -> float | None:
        """Useful time of all; None before there is any."""
        return self.useful_s / self.total_s if self.total_s > 0 else None

    def later(self, seconds: float, checkpoint_s: float) -> Self:
        """The same run so many seconds of training later, of which a part went into checkpoints."""
        return type(self)(
            self.useful_s + max(0.0, seconds - checkpoint_s),
            self.checkpoint_s + checkpoint_s,
            self.lost_s,
            self.down_s,
            self.paused_s,
        )


@dataclass(frozen=True)
class _Attempt:
    """One start of the workers.

    Attributes:
        start: when they were there.
        from_step: where they went on.
        end: the last that is known of them.
        saves: when, of which step, and how long training waited.
        was_stopped: by somebody who wanted it.
    """

    start: float
    from_step: int
    end: float
    saves: tuple[tuple[float, int, float], ...]
    was_stopped: bool


def goodput(events: Iterable[Event], until: float | None = None) -> Goodput:
    """Account for the time of a run.

    A step counts if it is part of what was trained on: those after the step that the next attempt resumed from
    were lost. The end of what an attempt kept is taken from the time of the checkpoint of that step.

    Args:
        events: of the run, in any order.
        until: when it was last seen training, if that is after its last event. UNIX seconds.
    """
    attempts = _attempts(sorted(events, key=lambda event: float(event.get("time", 0.0))), until)
    useful_s = checkpoint_s = lost_s = down_s = paused_s = 0.0
    for attempt, following in zip(attempts, [*attempts, None][1:], strict=True):
        kept_until = attempt.end if following is None else _kept_until(attempt, following.from_step)
        waited_s = min(sum(wait for time, _, wait in attempt.saves if time <= kept_until), kept_until - attempt.start)
        checkpoint_s += waited_s
        useful_s += kept_until - attempt.start - waited_s
        lost_s += attempt.end - kept_until
        if following is not None and attempt.was_stopped:
            paused_s += following.start - attempt.end
        elif following is not None:
            down_s += following.start - attempt.end
    return Goodput(useful_s, checkpoint_s, lost_s, down_s, paused_s)


def _attempts(events: list[Event], until: float | None) -> list[_Attempt]:
    starts = [place for place, event in enumerate(events) if event.get("event") == "workers_started"]
    attempts = []
    for place, following in pairwise([*starts, len(events)]):
        attempts.append(_attempt(events[place:following]))
    if attempts and until is not None and until > attempts[-1].end:
        last = attempts[-1]
        attempts[-1] = _Attempt(last.start, last.from_step, until, last.saves, last.was_stopped)
    return attempts


def _attempt(events: list[Event]) -> _Attempt:
    saves = [
        (float(event["time"]), int(event["step"]), float(event.get("stall_s") or 0.0))
        for event in events
        if event.get("event") == "checkpoint_saved" and "step" in event
    ]
    last = max(float(event["time"]) for event in events if event.get("event") != "failure")
    # trained until the failure was noticed; a second one without steps in between is of workers that did not start
    noticed = [float(event["time"]) for event in events if event.get("event") == "failure" and event["time"] > last]
    return _Attempt(
        start=float(events[0]["time"]),
        from_step=int(events[0].get("step", 0)),
        end=min(noticed, default=last),
        saves=tuple(saves),
        was_stopped=any(event.get("event") in ("interrupted", "run_finished") for event in events),
    )


def _kept_until(attempt: _Attempt, step: int) -> float:
    """When the step that the next attempt went on from was done."""
    kept = [time for time, saved, _ in attempt.saves if saved <= step]
    if attempt.saves and step > max(saved for _, saved, _ in attempt.saves):
        return attempt.end  # it was handed on without a checkpoint
    return max(kept, default=attempt.end if step > attempt.from_step else attempt.start)
