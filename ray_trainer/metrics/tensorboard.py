"""TensorBoard event files."""

import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray_trainer.metrics.appending import AppendingFile
from ray_trainer.storage import Storage

_NO_METRICS = ("step", "epoch", "split", "time", "attempt")


class TensorBoardWriter:
    """Scalars ``train/loss``, ``val/loss``, ... by step, in ``tensorboard/`` of the run's directory.

    Uses tensorboardX's messages, but not its ``SummaryWriter``: when the disk is full, that one's thread dies
    and the training then waits for ever at its queue of ten (seen with 2.6.5). Here a write that fails is
    retried at the next `flush`, and object stores need no local copy.
    """

    def __init__(self, storage: Storage, attempt: int, clock: Callable[[], float] = time.time) -> None:
        """Begin an event file of this attempt.

        Args:
            storage: the run's directory.
            attempt: which start of the run this is.
            clock: the time in seconds since 1970.
        """
        self._clock = clock
        stem = f"events.out.tfevents.{int(clock()):010d}.{socket.gethostname()}.attempt_{attempt:04d}"
        self._file = AppendingFile(storage.child("tensorboard"), lambda part: f"{stem}.{part:04d}" if part else stem)
        self._write_event(file_version="brain.Event:2")

    @property
    def degraded(self) -> str | None:
        """See `MetricsWriter`."""
        return self._file.degraded

    def write(self, row: Mapping[str, Any]) -> None:
        """See `MetricsWriter`. Values that are no numbers are left out."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{row['split']}/{name}", simple_value=float(value))
            for name, value in row.items()
            if name not in _NO_METRICS and isinstance(value, int | float)
        ]
        if values:
            self._write_event(step=row["step"], summary=Summary(value=values))

    def rewind(self, step: int) -> None:
        """See `MetricsWriter`. TensorBoard drops earlier points when it reads the mark that this leaves."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._write_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        """See `MetricsWriter`."""
        self._file.flush()

    def close(self) -> None:
        """See `MetricsWriter`."""
        self._file.flush()

    def _write_event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.append(_framed(Event(wall_time=self._clock(), **fields).SerializeToString()))


def _framed(message: bytes) -> bytes:
    """A TFRecord: length, its checksum, the message, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", masked_crc32c(length)) + message + struct.pack("<I", masked_crc32c(message))
