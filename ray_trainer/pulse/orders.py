"""What a monitor is told when it starts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Orders:
    """What it has to know of the run.

    Attributes:
        rank: the worker's.
        world_size: how many ranks there are.
        floor_s, patience_s: see `Terms`.
        past: phase and step of each time that a process of the run was ended so far: there it gets all the time.
        desk: host and port of the desk beside rank 0; None where there is one rank.
        token: shared by the monitors of a run.
        storage: where a hang is recorded, see `ray_trainer.hang_report.pack`.
    """

    rank: int
    world_size: int
    floor_s: float
    patience_s: float
    past: Sequence[tuple[int, int]]
    desk: tuple[str, int] | None
    token: str
    storage: str


@dataclass(frozen=True)
class Assignment:
    """All of it.

    Attributes:
        pid: the worker, its parent.
        board, stacks: descriptors of the board, and of the file that stacks go to.
        signal: makes the worker write its stacks.
        listener: descriptor of the desk's socket, beside rank 0.
        orders: of the run.
    """

    pid: int
    board: int
    stacks: int
    signal: int
    listener: int | None
    orders: Orders

    def to_json(self) -> str:
        """As text for a pipe."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """The inverse."""
        values = json.loads(text)
        return cls(**values | {"orders": Orders(**values["orders"])})
