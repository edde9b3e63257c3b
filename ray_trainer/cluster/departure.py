"""When a run leaves nodes that are going to be taken away."""

import enum
from collections.abc import Collection, Mapping

LEAVES_BEFORE_S = 10.0
LEAVES_BEFORE = 0.25  # of the notice


class Move(enum.Enum):
    """What is to be done next."""

    STAY = enum.auto()
    SAVE = enum.auto()
    LEAVE = enum.auto()


class Departure:
    """As soon as there is room elsewhere, and shortly before a node goes at the latest.

    Until then the run trains on where it is, with a save when it gets to know and another one shortly before. Where
    ranks on other nodes go on by themselves it does not leave at all without room: it could only stand still.

    Args:
        nodes: ids of the nodes on which its ranks are.
        outlives: ranks on other nodes go on by themselves when a node is lost.
    """

    def __init__(self, nodes: Collection[str], outlives: bool) -> None:
        self._nodes = frozenset(nodes)
        self._outlives = outlives
        self._leave_at: dict[str, float] = {}
        self._saved_before: set[str] = set()

    def affected(self, deadlines: Mapping[str, float]) -> dict[str, float]:
        """Those of the deadlines that are of nodes of this run."""
        return {node: deadlines[node] for node in self._nodes & deadlines.keys()}

    def next_move(self, deadlines: Mapping[str, float], has_room: bool, now: float) -> Move:
        """What is to be done, each time that something may have changed.

        Args:
            deadlines: when a node goes, in UNIX seconds by id; 0 if that is not known. Of nodes of this run, at least
                one.
            has_room: all workers find room on other nodes.
            now: UNIX seconds.
        """
        new = deadlines.keys() - self._leave_at.keys()
        for node in new:
            self._leave_at[node] = deadlines[node] - max(LEAVES_BEFORE_S, LEAVES_BEFORE * (deadlines[node] - now))
        due = {node for node in deadlines if now >= self._leave_at[node]}
        stays = self._outlives and deadlines.keys() != self._nodes
        if has_room or (due and not stays):
            return Move.LEAVE
        if new or due - self._saved_before:
            self._saved_before |= due
            return Move.SAVE
        return Move.STAY
