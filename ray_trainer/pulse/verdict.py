"""Who is to blame when ranks wait for each other."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """How far a rank has come, in the order in which ranks go.

    Attributes:
        step: completed steps.
        exchanges: with other ranks that it entered since then.
        phase: in which it waits.
    """

    step: int
    exchanges: int
    phase: int


class Blame(NamedTuple):
    """Which of several waiting ranks have to go.

    Attributes:
        ranks: to be replaced.
        reason: for people.
        is_certain: they differ from the others; else no rank does, and all go.
    """

    ranks: frozenset[int]
    reason: str
    is_certain: bool


def blame(places: Mapping[int, Place]) -> Blame:
    """Decide when every rank waits for others and none has anything of its own to do.

    Ranks in step are at the same place. One that skipped an exchange is ahead of those that wait for it there, and
    one that entered an exchange too many is behind: whoever differs from more than half goes, and where there is no
    such majority, whoever is ahead.
    """
    common, count = Counter(places.values()).most_common(1)[0]
    if count == len(places):
        return Blame(frozenset(places), "all ranks wait for each other in the same exchange", is_certain=False)
    if 2 * count > len(places):
        others = frozenset(rank for rank, place in places.items() if place != common)
        return Blame(others, "the rank is at another exchange than most others", is_certain=True)
    ahead = max(places.values())
    others = frozenset(rank for rank, place in places.items() if place == ahead)
    return Blame(others, "the rank is ahead of an exchange in which others wait for it", is_certain=True)
