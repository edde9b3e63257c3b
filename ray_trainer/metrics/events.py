"""What happened to a run, over all its attempts: ``events.jsonl``."""

import time
from collections.abc import Callable
from typing import Any, Self

from ray_trainer.metrics.jsonl import JsonlLog, Row, read_rows
from ray_trainer.storage import Storage

_NAME = "events.jsonl"


class EventLog:
    """Records events of one attempt. Lines of earlier attempts are never touched.

    Several processes may record at the same time; recording never fails, see `degraded`.
    """

    def __init__(
        self, storage: Storage, attempt: int, writer: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """Open nothing.

        Args:
            storage: the run's directory.
            attempt: which start of the run this is, from `next_attempt`.
            writer: tells processes apart that record at the same time, as ``driver``.
            clock: the time in seconds since 1970.
        """
        self._attempt = attempt
        self._clock = clock
        self._log = JsonlLog(storage, _NAME, attempt, writer)

    @classmethod
    def of_controller(
        cls, storage: Storage, clock: Callable[[], float] = time.time, writer: str = "controller"
    ) -> Self:
        """For a process that watches the workers: records as a part of the newest attempt."""
        return cls(storage, max(1, next_attempt(storage) - 1), writer, clock)

    @property
    def degraded(self) -> str | None:
        """Why events are waiting or lost, for the user; None if all is well."""
        return self._log.degraded

    def record(self, event: str, step: int | None = None, epoch: int | None = None, **details: Any) -> Row:
        """Write an event at once, on object stores too: the next thing to happen may be the end.

        Args:
            event: its name, as ``checkpoint_saved``.
            step: completed steps of the run.
            epoch: the epoch in progress.
            **details: plain values.

        Returns:
            The row: ``time``, ``event``, ``attempt``, ``step`` and ``epoch`` where given, and the details.
        """
        row: Row = {"time": self._clock(), "event": event, "attempt": self._attempt}
        row |= {name: value for name, value in (("step", step), ("epoch", epoch)) if value is not None}
        row |= details
        self._log.append(row)
        self._log.flush()
        return row


def read_events(storage: Storage) -> list[Row]:
    """The events of all attempts and writers, oldest first; rows that are none, as an editor leaves them, left out."""
    return sorted(filter(_is_event, read_rows(storage, _NAME)), key=lambda row: row["time"])


def saved_checkpoints(storage: Storage) -> list[str]:
    """The names of the checkpoints of the run that were whole once, the newest last; most are deleted by now.

    Where the run went back to an earlier one, those after it are not part of it any more.
    """
    steps: dict[str, int] = {}
    for row in sorted(read_events(storage), key=lambda row: row.get("attempt", 0)):  # clocks may differ between starts
        match row:
            case {"event": "checkpoint_saved", "checkpoint": str(name), "step": int(step)}:
                steps.pop(name, None)
                steps[name] = step
            case {"event": "resumed", "step": int(last)} | {
                "event": "rolled_back",
                "tier": "storage",
                "to_step": int(last),
            }:
                steps = {name: step for name, step in steps.items() if step <= last}
            case {"event": "took_over"}:  # another trial of a population, instead of its own past
                steps = {}
    return list(steps)


def _is_event(row: Row) -> bool:
    return (
        isinstance(row.get("time"), int | float)
        and isinstance(row.get("event"), str)
        and isinstance(row.get("attempt", 1), int)
    )


def next_attempt(storage: Storage) -> int:
    """The number of the next attempt: 1 for a new run. Reads only."""
    return 1 + max((int(row.get("attempt", 0)) for row in read_events(storage)), default=0)
