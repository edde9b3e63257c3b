"""What is known of a node. Does not import Ray."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NodeFacts:
    """What one node told.

    Attributes:
        host: its name and address.
        problem: why it told nothing; empty if it did.
        clock_offset_s: how far its clock is ahead of this machine's.
        clock_error_s: how far that may be wrong.
        versions: by package; None for what is not there.
        memory_bytes: of the machine.
        shared_memory_bytes: of /dev/shm; 0 if it has none.
        storage_problem: why it does not see what others write, or can't write; empty if it can.
    """

    host: str
    problem: str = ""
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0
    versions: dict[str, str | None] = field(default_factory=dict)
    memory_bytes: int = 0
    shared_memory_bytes: int = 0
    storage_problem: str = ""
