"""Where logged rows go."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ray_trainer.metrics.jsonl import JsonlLog
from ray_trainer.storage import Storage


class MetricsWriter(Protocol):
    """Takes the rows of logged steps and validations, on rank 0.

    A row has ``step``, ``epoch``, ``split`` (``train`` or ``val``) and the metrics. No method raises because
    storage fails: training is worth more than its curves. `degraded` says so instead.
    """

    @property
    def degraded(self) -> str | None:
        """Why rows are waiting or lost, for the user; None if all is well."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row."""

    def rewind(self, step: int) -> None:
        """Drop rows of steps after ``step``: training continues from there."""

    def flush(self) -> None:
        """Bring what was taken to storage; retry what failed."""

    def close(self) -> None:
        """Flush; nothing is written afterwards."""


class JsonlWriter:
    """Rows as lines of ``metrics.jsonl``, each with its ``time``; (split, step) stands once."""

    def __init__(self, storage: Storage, attempt: int, clock: Callable[[], float] = time.time) -> None:
        """Write into the run's directory."""
        self._log = JsonlLog(storage, "metrics.jsonl", attempt)
        self._clock = clock

    @property
    def degraded(self) -> str | None:
        """See `MetricsWriter`."""
        return self._log.degraded

    def write(self, row: Mapping[str, Any]) -> None:
        """See `MetricsWriter`."""
        self._log.append({**row, "time": self._clock()})

    def rewind(self, step: int) -> None:
        """See `MetricsWriter`. Here storage that fails does raise: rows would stand twice.

        Raises:
            OSError: the file could not be read or written.
        """
        self._log.rewind(lambda row: int(row.get("step", 0)) <= step)

    def flush(self) -> None:
        """See `MetricsWriter`."""
        self._log.flush()

    def close(self) -> None:
        """See `MetricsWriter`."""
        self._log.flush()


class Writers:
    """Several writers as one; without any, as on ranks other than 0, it does nothing."""

    def __init__(self, writers: Iterable[MetricsWriter] = ()) -> None:
        """Write to all of these, in this order."""
        self._writers = tuple(writers)

    @property
    def degraded(self) -> str | None:
        """See `MetricsWriter`."""
        reasons = [reason for writer in self._writers if (reason := writer.degraded)]
        return "; ".join(reasons) or None

    def write(self, row: Mapping[str, Any]) -> None:
        """See `MetricsWriter`."""
        for writer in self._writers:
            writer.write(row)

    def rewind(self, step: int) -> None:
        """See `MetricsWriter`."""
        for writer in self._writers:
            writer.rewind(step)

    def flush(self) -> None:
        """See `MetricsWriter`."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """See `MetricsWriter`."""
        for writer in self._writers:
            writer.close()
