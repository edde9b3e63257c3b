"""The process beside a worker that finds out whether the worker hangs, says where, and ends it.

It reads the worker's board, needs no answer from it, and so finds a worker that holds the GIL or was stopped. It
ends with the worker.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ray_trainer.pulse.board import Board, Reading
from ray_trainer.pulse.deadlines import MULTIPLE, Terms, deadline_s
from ray_trainer.pulse.descent import die_with, ignore_interruptions
from ray_trainer.pulse.desk import Desk, Report, ask, serve
from ray_trainer.pulse.phases import Phase
from ray_trainer.pulse.stacks import Activity, Frame, activity, frames_of
from ray_trainer.pulse.verdict import Place

logger = logging.getLogger(__name__)

TICK_S = 0.25
#: More than this does not pass between two looks, whatever the clock says: this process was held up as well.
_LONGEST_TICK_S = 1.0
_EXAMINED_EVERY_S = 1.0
#: A stack that stays the same for so long is that of a hang, once the deadline has passed.
SAME_FOR_S = 3.0
_DUMPED_WITHIN_S = 1.0
_REPORTED_WITHIN_S = 15.0
_NUM_LAST_LINES = 5


@dataclass(frozen=True)
class Orders:
    """What a monitor has to know of the run.

    Attributes:
        rank: the worker's.
        world_size: how many ranks there are.
        floor_s, patience_s: see `Terms`.
        excused: phases and steps in which an earlier process was ended: they get all the time.
        desk: host and port of the desk beside rank 0; None where there is one rank.
        token: shared by the monitors of a run.
        storage: where a hang is recorded, see `ray_trainer.hang_report.pack`.
    """

    rank: int
    world_size: int
    floor_s: float
    patience_s: float
    excused: Sequence[tuple[int, int]]
    desk: tuple[str, int] | None
    token: str
    storage: str


@dataclass(frozen=True)
class Assignment:
    """All that a monitor is told when it starts.

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


class Hang(NamedTuple):
    """A finding.

    Attributes:
        phase: in which the worker was.
        step: that it had completed.
        seconds: without a sign of life.
        reason: why it is the one to go.
    """

    phase: Phase
    step: int
    seconds: float
    reason: str


class Watch:
    """Follows one worker, tick by tick."""

    def __init__(self, assignment: Assignment) -> None:
        self._orders = orders = assignment.orders
        self._pid = assignment.pid
        self._terms = Terms(orders.floor_s, orders.patience_s)
        self._excused = {(phase, step) for phase, step in orders.excused}
        self._board = Board(assignment.board)
        self.stacks = Stacks(assignment.pid, assignment.stacks, assignment.signal)
        self._begin(self._board.read())

    @property
    def beats(self) -> int:
        """Number of the worker's last sign of life, now."""
        return self._board.read().beats

    @property
    def thread(self) -> int:
        """The worker's thread that trains."""
        return self._reading.thread

    def look(self, passed_s: float) -> Hang | None:
        """Look at the worker.

        Args:
            passed_s: seconds since the last look.
        """
        reading = self._board.read()
        if reading.beats != self._reading.beats:
            self._begin(reading)
            return None
        self._still_s += passed_s
        self._locked_s = self._locked_s + passed_s if reading.turns == self._turns else 0.0
        self._turns = reading.turns
        if self._still_s < min(1.0, self._terms.floor_s):
            return None
        state = state_of(self._pid)
        self._stopped_s = self._stopped_s + passed_s if state == "T" else 0.0
        if state in ("T", "t"):  # by a signal, or by a debugger
            return self._found("it was stopped by a signal") if self._stopped_s >= self._terms.floor_s else None
        self._unexamined_s += passed_s
        if self._still_s < self._deadline_s() or self._unexamined_s < _EXAMINED_EVERY_S:
            return None
        elapsed_s, self._unexamined_s = self._unexamined_s, 0.0
        return self._examine(elapsed_s)

    def _begin(self, reading: Reading) -> None:
        """Something has happened: all starts anew."""
        self._reading = reading
        self._turns = reading.turns
        self._still_s = 0.0
        self._locked_s = 0.0
        self._stopped_s = 0.0
        self._unexamined_s = _EXAMINED_EVERY_S
        self._frames: tuple[Frame, ...] | None = None
        self._same_s = 0.0
        self._same_for_s = SAME_FOR_S

    def _deadline_s(self) -> float:
        phase = self._reading.phase
        if (phase, self._reading.step) in self._excused:
            return self._limit_s()
        return deadline_s(phase, self._board.durations(phase), self._terms)

    def _limit_s(self) -> float:
        """What even a worker that is at work may take in one phase."""
        longest_s = self._board.durations(self._reading.phase).longest_s
        return max(self._terms.floor_s, self._terms.patience_s, MULTIPLE * longest_s)

    def _examine(self, elapsed_s: float) -> Hang | None:
        """A deadline has passed. Work changes the stack, a hang does not."""
        if self._reading.phase is Phase.EXCHANGE:
            return self._ask()
        frames = frames_of(self.stacks.take(), self._reading.thread)
        if frames == self._frames:
            self._same_s += elapsed_s
        else:
            if self._frames is not None:
                self._same_for_s = self._deadline_s()
            self._frames, self._same_s = frames, 0.0
        if self._still_s >= self._limit_s() + SAME_FOR_S:
            return self._found("it takes too long")
        does = activity(frames)
        if does is Activity.WAITS and self._orders.world_size > 1:
            return self._ask()
        is_hung = self._same_s >= self._same_for_s and does is not Activity.EXCUSED
        return self._found("nothing changes in it, while it waits for nobody") if is_hung else None

    def _ask(self) -> Hang | None:
        """The worker waits for others: whether it is to blame depends on them, if it can go on at all."""
        desk, reading = self._orders.desk, self._reading
        if self._locked_s >= self._terms.floor_s:
            return self._found("another thread of it holds the interpreter")
        if desk is None:
            return None
        host, port = desk
        place = Place(reading.step, reading.exchanges, int(reading.phase))
        report = Report(self._orders.rank, place, reading.beats)
        reason = ask((host, port), self._orders.token, report)
        return self._found(reason) if reason else None

    def _found(self, reason: str) -> Hang:
        return Hang(self._reading.phase, self._reading.step, self._still_s, reason)


class Stacks:
    """Has the worker's stacks written by the handler in C that the worker has installed."""

    def __init__(self, pid: int, descriptor: int, number: int) -> None:
        self._pid = pid
        self._descriptor = descriptor
        self._signal = number

    def take(self) -> str:
        """The stacks of all threads now; empty if the worker does not write them."""
        os.ftruncate(self._descriptor, 0)
        os.kill(self._pid, self._signal)
        size, until = 0, time.monotonic() + _DUMPED_WITHIN_S
        while time.monotonic() < until:
            time.sleep(0.05)
            written = os.fstat(self._descriptor).st_size
            if written and written == size:
                break
            size = written
        return os.pread(self._descriptor, size, 0).decode(errors="replace")

    def take_stopped(self) -> str:
        """As `take`, of a worker that was stopped: it runs for the moment that this takes."""
        os.kill(self._pid, signal.SIGCONT)
        try:
            return self.take()
        finally:
            os.kill(self._pid, signal.SIGSTOP)


def state_of(pid: int) -> str:
    """As in /proc: R, S, D, T (stopped), t (traced), Z; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def end(assignment: Assignment, hang: Hang, text: str, thread: int) -> None:
    """Record a hang and end the worker."""
    frames = frames_of(text, thread)
    last = [str(frame) for frame in frames[:_NUM_LAST_LINES]]
    where = last[0] if last else "its stack is not known"
    logger.error(
        "Rank %d hangs: %.0f s without a sign of life in %s after step %d; %s (%s). It is ended.",
        *(assignment.orders.rank, hang.seconds, hang.phase.name.lower(), hang.step, hang.reason, where),
    )
    details = {
        "rank": assignment.orders.rank,
        "phase": hang.phase.name.lower(),
        "seconds": round(hang.seconds, 1),
        "reason": hang.reason,
        "host": socket.gethostname(),
        "pid": assignment.pid,
        "last_lines": last,
    }
    _record({"storage": assignment.orders.storage, "step": hang.step, "details": details, "stacks": text})
    if os.getppid() == assignment.pid:
        os.kill(assignment.pid, signal.SIGCONT)
        os.kill(assignment.pid, signal.SIGKILL)


def _record(hang: dict[str, Any]) -> None:
    """Through a process of its own: storage may be what hangs."""
    command = [sys.executable, "-S", "-P", "-m", "ray_trainer.hang_report"]
    try:
        subprocess.run(command, input=json.dumps(hang), text=True, timeout=_REPORTED_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("The hang could not be recorded with the run: %s", error)


def watch(assignment: Assignment) -> None:
    """Until the worker is gone, or has to go."""
    watched = Watch(assignment)
    before = time.monotonic()
    while os.getppid() == assignment.pid:
        time.sleep(TICK_S)
        now = time.monotonic()
        hang = watched.look(min(now - before, _LONGEST_TICK_S))
        before = now
        if hang is None:
            continue
        is_stopped = state_of(assignment.pid) == "T"
        beats = watched.beats
        text = watched.stacks.take_stopped() if is_stopped else watched.stacks.take()
        if is_stopped or watched.beats == beats:
            end(assignment, hang, text, watched.thread)


def main() -> None:
    """Take the assignment from the parent and watch it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    assignment = Assignment.from_json(sys.stdin.read())
    die_with(assignment.pid)
    ignore_interruptions()
    if assignment.listener is not None:
        listener = socket.socket(fileno=assignment.listener)
        desk = Desk(assignment.orders.world_size, assignment.orders.floor_s)
        threading.Thread(target=serve, args=(listener, desk, assignment.orders.token), daemon=True).start()
    watch(assignment)


if __name__ == "__main__":
    main()
