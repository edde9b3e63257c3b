"""A memory beside storage that keeps the newest snapshot of a run."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_trainer.storage.sealing import FileInMemory


@dataclass(frozen=True)
class SnapshotPart:
    """What one rank adds to a snapshot.

    Attributes:
        key: (attempt, step): which snapshot; the greatest is the newest.
        rank: whose part it is.
        num_parts: of the whole snapshot.
        manifest: of the checkpoint, with no files in it; empty on other ranks than 0.
        files: where each file lies in the content, and its checksum.
    """

    key: tuple[int, int]
    rank: int
    num_parts: int
    manifest: bytes
    files: tuple[tuple[FileInMemory, str], ...]

    @property
    def origin(self) -> tuple[tuple[int, int], int]:
        """Of which snapshot it is, and whose."""
        return self.key, self.rank


class SnapshotStore(Protocol):
    """Memory that outlives the workers. It keeps the newest complete snapshot, and the parts of the next.

    Whatever cannot be reached raises ``OSError``.

    Attributes:
        every_n_steps: how often a snapshot is wanted.
    """

    every_n_steps: int

    def put(self, part: SnapshotPart, content: NDArray[np.uint8]) -> None:
        """Keep a part; returns once it does not depend on this process any more."""

    def newest(self) -> list[SnapshotPart] | None:
        """The parts of the newest complete snapshot, in rank order."""

    def content(self, part: SnapshotPart) -> NDArray[np.uint8]:
        """The bytes of a part."""


@dataclass(frozen=True)
class KeptState:
    """A snapshot of the whole state by one rank.

    Attributes:
        part: the only one.
        content: its bytes.
        carried: what was known beside the state; plain.
        own: what this rank alone has; None on one that was given the snapshot.
    """

    part: SnapshotPart
    content: NDArray[np.uint8]
    carried: Any
    own: dict[str, Any] | None


@dataclass
class ProcessMemory:
    """What a process keeps from a run that broke, for the next one in the same process.

    Attributes:
        kept: its state, if it was whole.
        story: when it was lost and how the ranks found together again; plain.
        stop: why the run must not train any more, but for what it has to save; 0 if it may.
        may_grow: there are fewer ranks than there could be, and a process waits to join.
    """

    kept: KeptState | None = None
    stop: int = 0
    may_grow: bool = False
    story: dict[str, Any] = field(default_factory=dict)
