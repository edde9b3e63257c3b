"""How long a phase may last before the process counts as hung: learned from how long it has lasted so far."""

from dataclasses import dataclass

from ray_trainer.pulse.board import Durations
from ray_trainer.pulse.phases import PATIENT, UNEVEN, Phase

#: Durations of a phase after which what is usual is known.
LEARNED_AFTER = 5
MULTIPLE = 3.0


@dataclass(frozen=True)
class Terms:
    """What a user may choose.

    Attributes:
        floor_s: no deadline is shorter.
        patience_s: the deadline where nothing is known yet, or never will be.
    """

    floor_s: float
    patience_s: float


def deadline_s(phase: Phase, durations: Durations, terms: Terms) -> float:
    """Seconds in a phase after which it is looked at closely.

    Several times the 99th percentile, or the longest where a phase is not alike each time; never under the floor.
    Compiling, or loading for the first time, happens before enough is known.
    """
    if phase in PATIENT or sum(durations.counts) < LEARNED_AFTER:
        return longest_wait_s(durations, terms)
    usual_s = durations.longest_s if phase in UNEVEN else percentile_s(durations, 0.99)
    return max(terms.floor_s, MULTIPLE * usual_s)


def longest_wait_s(durations: Durations, terms: Terms) -> float:
    """Seconds that a phase is given where nothing better is known."""
    return max(terms.floor_s, terms.patience_s, MULTIPLE * durations.longest_s)


def percentile_s(durations: Durations, share: float) -> float:
    """A time which that share of the durations did not exceed; up to twice too long, for want of finer classes."""
    wanted = share * sum(durations.counts)
    seen = 0
    for number, count in enumerate(durations.counts):
        seen += count
        if count and seen >= wanted:
            return min(2.0**number * 1e-6, durations.longest_s)
    return 0.0
