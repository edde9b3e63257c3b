"""Where the monitors of all ranks tell that their rank waits, and learn whether it is to blame: beside rank 0."""

import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray_trainer.pulse.verdict import Place, blame

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_LONGEST_LINE = 4096
#: A rank that has not told again for this long does something else by now.
FRESH_S = 3.0
#: All ranks must have been waiting at their places for this long together.
SETTLED_S = 1.5
#: Times the floor after which ranks that all wait at the same place are all replaced.
PATIENCE_FLOORS = 6.0


@dataclass(frozen=True)
class Report:
    """What the monitor of a waiting rank tells.

    Attributes:
        rank: which.
        place: where it waits.
        beats: number of its last sign of life.
    """

    rank: int
    place: Place
    beats: int


class Desk:
    """Knows who waits where; decides once all do."""

    def __init__(self, world_size: int, floor_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._world_size = world_size
        self._floor_s = floor_s
        self._clock = clock
        self._reports: dict[int, tuple[Report, float]] = {}
        self._complete_since: float | None = None
        self._lock = threading.Lock()

    def consider(self, report: Report) -> str | None:
        """Take a report; why its rank has to be replaced, or None."""
        with self._lock:
            now = self._clock()
            known = self._reports.get(report.rank)
            if known is None or known[0] != report:
                self._complete_since = None
            self._reports[report.rank] = report, now
            self._reports = {rank: item for rank, item in self._reports.items() if now - item[1] < FRESH_S}
            if len(self._reports) < self._world_size:
                self._complete_since = None
                return None
            if self._complete_since is None:
                self._complete_since = now
            found = blame({rank: item[0].place for rank, item in self._reports.items()})
            needed_s = SETTLED_S if found.is_certain else PATIENCE_FLOORS * self._floor_s
            is_settled = now - self._complete_since >= needed_s
            return found.reason if is_settled and report.rank in found.ranks else None


def serve(listener: socket.socket, desk: Desk, token: str) -> None:
    """Answer for ever, in a thread of its own."""
    while True:
        with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger, or a monitor that went
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_TIMEOUT_S)
                question = json.loads(_read_line(connection))
                if hmac.compare_digest(str(question["token"]), token):
                    report = Report(question["rank"], Place(*question["place"]), question["beats"])
                    _write_line(connection, desk.consider(report))


def ask(address: tuple[str, int], token: str, report: Report) -> str | None:
    """Tell the desk that a rank waits; why it has to be replaced, or None, also if nobody answers."""
    question = {"token": token, "rank": report.rank, "place": report.place, "beats": report.beats}
    try:
        with socket.create_connection(address, _TIMEOUT_S) as connection:
            _write_line(connection, question)
            answer = json.loads(_read_line(connection))
    except (OSError, ValueError) as error:
        logger.debug("The monitor of rank 0 does not answer: %s", error)
        return None
    return answer if isinstance(answer, str) else None


def _write_line(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        received = connection.recv(_LONGEST_LINE)
        if not received or len(data) > _LONGEST_LINE:
            raise ValueError("not a line")
        data += received
    return data
