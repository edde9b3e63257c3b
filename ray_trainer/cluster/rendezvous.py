"""Where the workers of a run find each other: which process is which rank of which generation.

The class travels by value into an actor whose process starts without importing this package and torch, so nothing
of either is used here.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

#: A process: its ``name``, different from all others; its ``place`` among Ray's workers; its ``actor``; more.
Card = dict[str, Any]

_RECENT_S = 3.0
_LOOKS_EVERY_S = 0.2


@dataclass
class _Waiting:
    """A process that asks for the next generation: who, since when, when it did so last, and what it knew then."""

    card: Card
    since_s: float
    asked_s: float
    past: int


class Deaths:
    """Knows of processes whether they are dead, as soon as Ray does. Never waits."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[str, float, ray.ObjectRef]] = {}  # by place

    def __call__(self, card: Card) -> bool:
        """Whether it is certain that a process is dead."""
        name, asked_s, answer = self._asked.get(card["place"], ("", 0.0, None))
        if name != card["name"]:
            self._ask(card)
            return False
        if not ray.wait([answer], timeout=0)[0]:
            return False
        try:
            ray.get(answer)
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayError:
            pass  # it can't be reached at the moment
        if time.monotonic() - asked_s > _LOOKS_EVERY_S:
            self._ask(card)
        return False

    def _ask(self, card: Card) -> None:
        self._asked[card["place"]] = (card["name"], time.monotonic(), card["actor"].__ray_ready__.remote())


class Rendezvous:
    """Forms the generations of a run, and hands out their ranks.

    A survivor keeps its rank. That of a process that is dead goes to the one that has waited longest. Who is left over
    is a spare and goes on waiting. As long as a member may be alive and has not come, it is waited for: it has the
    state, or trains.

    Where training can go on with any number of ranks, survivors do not wait for those that are missing. Their ranks are
    numbered anew then, and a process that has come meanwhile joins them in a generation after that. Elsewhere they do
    so only to save what they have, once the run is to stop.

    The actor forgets everything when it dies, and needs nothing of it: whoever waits asks again and again, and knows
    who the members of the last generation are. Where nobody does, all workers have to be here, so none trains.

    Args:
        num_ranks: that train together.
        num_places: workers of Ray, spares included.
        may_shrink: survivors go on without those that are missing.
        is_dead: whether it is certain that a process is dead.
        clock: seconds.
    """

    def __init__(
        self,
        num_ranks: int,
        num_places: int,
        may_shrink: bool = False,
        is_dead: Callable[[Card], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_ranks, self._num_places, self._may_shrink = num_ranks, num_places, may_shrink
        self._is_dead = is_dead or Deaths()
        self._clock = clock
        self._number = 0
        self._members: dict[int, Card] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._ranks: dict[int, tuple[str, int]] = {}  # by place: the last process there that was a member
        self._ended: dict[int, bytes] = {}
        self._outcome: bytes | None = None
        self._complete_s: float | None = None
        self._stop = 0

    def join(self, card: Card, past: int) -> dict[str, Any]:
        """Ask for the next generation, again and again; who has not asked of late counts as gone.

        Args:
            card: of the caller, always the same.
            past: the number of the newest generation that the caller knows of; 0 for none.

        Returns:
            ``number`` of the newest generation known here; its ``members`` by rank if the caller does not know of it,
            who belongs to it if it is among them; ``gathers``: whether the next one is due, else the caller is a
            spare; or the ``outcome``, if the run has ended.
        """
        place = card["place"]
        if self._outcome is not None:
            self._waiting.pop(place, None)
            return {"number": self._number, "outcome": self._outcome}
        if not (self._number > past and card["name"] in self._names()):
            self._note(card, past)
            if self._number >= past:  # else its members are not known here yet
                self._form_if_complete()
        news = {"members": self._members} if self._number > past else {}
        return {"number": self._number, "gathers": self._gathers(), **news}

    def remember(self, number: int, members: dict[int, Card]) -> None:
        """Learn of the newest generation, by one that knows of it."""
        if number > self._number:
            self._number, self._members, self._ended = number, members, {}
            self._ranks |= {card["place"]: (card["name"], rank) for rank, card in members.items()}

    def end(self, rank: int, number: int, outcome: bytes) -> dict[str, Any]:
        """Say that a rank is done, again and again.

        Args:
            rank: of the caller.
            number: of its generation.
            outcome: what is to be returned by all, if this is rank 0.

        Returns:
            ``number`` as in `join`; ``outcome`` once all ranks are done and the spares know; ``is_broken`` if one has
            died before it was done, so that the caller has to come back.
        """
        answer: dict[str, Any] = {"number": self._number, "is_broken": self._number > number}
        if self._number != number:
            return answer
        self._ended[rank] = outcome
        if self._outcome is None and len(self._ended) == len(self._members):
            self._outcome = self._ended[0]
        if self._outcome is None:
            answer["is_broken"] = self._is_broken()
        elif not self._present():
            answer["outcome"] = self._outcome
        return answer

    def outlook(self, number: int) -> dict[str, Any]:
        """What a generation may not notice by itself.

        Returns:
            ``number`` as in `join`; ``is_over``: it has lost a rank, for which the others may wait; ``may_grow``: it
            has fewer ranks than there could be, and a process waits that is ready to be one.
        """
        is_newest = self._number == number and self._outcome is None
        is_over = is_newest and self._is_broken()
        is_short = is_newest and not is_over and len(self._members) < self._num_ranks
        may_grow = is_short and any(self._waiting[card["place"]].past == number for card in self._newcomers())
        return {"number": self._number, "is_over": is_over, "may_grow": may_grow}

    def stop(self, stop: int) -> None:
        """Learn that the run is to stop, and why: who has survived waits for nobody any more.

        A generation that has fewer ranks only because of that finds it as ``stop`` in its cards, and must not train.
        """
        self._stop = stop

    def outcome(self) -> bytes | None:
        """What the run has come to, once all ranks are done."""
        return self._outcome

    def absent(self) -> list[ActorHandle]:
        """The members that may be alive and do not come for the next generation."""
        present = {card["name"] for card in self._present()}
        missing = [card for card in self._members.values() if card["name"] not in present]
        return [card["actor"] for card in missing if not self._is_gone(card)]

    def bury(self, places: Collection[int]) -> dict[int, int | None]:
        """Which ranks the processes at these places had, which have failed.

        Returns:
            None for a spare that is not missed, and a negative number for a process without a rank that is.
        """
        buried: dict[int, int | None] = {}
        for place in places:
            _, rank = self._ranks.pop(place, ("", None))
            buried[place] = -1 - place if rank is None and self._gathers() else rank
        return buried

    def _names(self) -> set[str]:
        return {card["name"] for card in self._members.values()}

    def _note(self, card: Card, past: int) -> None:
        place, now_s = card["place"], self._clock()
        known = self._waiting.get(place)
        since_s = known.since_s if known is not None and known.card["name"] == card["name"] else now_s
        self._waiting[place] = _Waiting(card, since_s, now_s, past)
        if self._ranks.get(place, (card["name"], 0))[0] != card["name"]:
            del self._ranks[place]  # of a process that is gone

    def _present(self) -> list[Card]:
        """Those who wait, from who has waited longest on."""
        recent_s = self._clock() - _RECENT_S
        waiting = sorted(self._waiting.values(), key=lambda each: each.since_s)
        return [each.card for each in waiting if each.asked_s > recent_s]

    def _newcomers(self) -> list[Card]:
        """Those of them that are no members."""
        return [card for card in self._present() if card["name"] not in self._names() and not self._is_dead(card)]

    def _gathers(self) -> bool:
        """Whether the members of the newest generation do not train together any more, or there are none."""
        if not self._members:
            return True
        present = {card["name"] for card in self._present()}
        return any(card["name"] in present or self._is_replaced(card) for card in self._members.values())

    def _is_broken(self) -> bool:
        """Whether a member has come for the next generation, or has died before it was done."""
        return self._gathers() or any(
            self._is_dead(card) for rank, card in self._members.items() if rank not in self._ended
        )

    def _is_replaced(self, card: Card) -> bool:
        """Whether Ray has started another process in the place of this one."""
        there = self._waiting.get(card["place"])
        return there is not None and there.card["name"] != card["name"]

    def _is_gone(self, card: Card) -> bool:
        return self._is_replaced(card) or self._is_dead(card)

    def _form_if_complete(self) -> None:
        chosen = self._choose() if self._gathers() else None
        if chosen is None:
            self._complete_s = None
            return
        if self._complete_s is None:
            self._complete_s = self._clock()
        if any(self._waiting[card["place"]].asked_s < self._complete_s for card in chosen.values()):
            return  # it may have died since it asked
        self._number += 1
        self._members, self._ended, self._complete_s = chosen, {}, None
        for rank, card in chosen.items():
            del self._waiting[card["place"]]
            self._ranks[card["place"]] = (card["name"], rank)

    def _choose(self) -> dict[int, Card] | None:
        """The members of the next generation by rank, or None as long as one is missing."""
        present = self._present()
        if not self._members:
            first = sorted(present, key=lambda card: int(card["place"]))
            return dict(enumerate(first[: self._num_ranks])) if len(first) == self._num_places else None
        names = {card["name"] for card in present}
        ranks = {rank: card for rank, card in self._members.items() if card["name"] in names}
        if not all(rank in ranks or self._is_gone(card) for rank, card in self._members.items()):
            return None
        free = [rank for rank in range(self._num_ranks) if rank not in ranks]
        chosen = ranks | dict(zip(free, self._newcomers(), strict=False))
        if len(chosen) == self._num_ranks:
            return chosen
        if not ranks or not (self._may_shrink or self._stop):
            return None
        stop = 0 if self._may_shrink else self._stop
        return dict(enumerate(card | {"stop": stop} for _, card in sorted(chosen.items())))
