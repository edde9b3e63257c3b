"""Whether a worker hangs: what is seen of it from outside, tick by tick."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ray_trainer.pulse.board import Board, Reading
from ray_trainer.pulse.deadlines import Terms, deadline_s, longest_wait_s
from ray_trainer.pulse.desk import Report, ask
from ray_trainer.pulse.orders import Assignment
from ray_trainer.pulse.phases import PATIENT, Phase
from ray_trainer.pulse.stacks import Activity, Frame, StackFile, activity, are_alike, frames_of
from ray_trainer.pulse.verdict import Place

#: A stack that has stayed the same for so long when a deadline passes, or for half of the floor, is that of a hang.
SAME_FOR_S = 5.0
#: The same where the stack says that it waits for storage, a network or another process, which may come back.
OUTSIDE_FOR_S = 90.0
_EXAMINATIONS = 10
#: Not before so many seconds, a multiple of the time between two turns, is the interpreter held for good.
_LOCKED_FOR_S = 3.0


class Hang(NamedTuple):
    """A finding.

    Attributes:
        phase: in which the worker is.
        step: how many it had completed.
        seconds: without a sign of life.
        reason: why it is the one to go.
    """

    phase: Phase
    step: int
    seconds: float
    reason: str


@dataclass
class _Stillness:
    """Since the last sign of life.

    Attributes:
        reading: the board.
        still_s: how long.
        turns, locked_s: of threads beside the one that trains, and since when none had one.
        stopped_s: how long a signal has stopped the process.
        unexamined_s: since the stack was last looked at.
        frames, same_s: the stack, and since when it is the same.
        was_at_work: the stack has changed.
    """

    reading: Reading
    still_s: float = 0.0
    turns: int = -1
    locked_s: float = 0.0
    stopped_s: float = 0.0
    unexamined_s: float = SAME_FOR_S  # long enough for the first time
    frames: tuple[Frame, ...] | None = None
    same_s: float = 0.0
    was_at_work: bool = False


class Watch:
    """Follows one worker."""

    def __init__(self, assignment: Assignment) -> None:
        self._pid = assignment.pid
        self._orders = assignment.orders
        self._terms = Terms(assignment.orders.floor_s, assignment.orders.patience_s)
        self._same_for_s = min(SAME_FOR_S, self._terms.floor_s / 2)
        self._examined_every_s = self._same_for_s / _EXAMINATIONS
        self._past = Counter((phase, step) for phase, step in assignment.orders.past)
        self._board = Board(assignment.board)
        self._stacks = StackFile(assignment.pid, assignment.stacks, assignment.signal)
        self._now = _Stillness(self._board.read())

    def look(self, passed_s: float) -> Hang | None:
        """Look at the worker.

        Args:
            passed_s: seconds since the last look.
        """
        now, reading = self._now, self._board.read()
        if reading.beats != now.reading.beats:
            self._now = _Stillness(reading)
            return None
        now.still_s += passed_s
        now.locked_s = now.locked_s + passed_s if reading.turns == now.turns else 0.0
        now.turns = reading.turns
        state = state_of(self._pid)
        now.stopped_s = now.stopped_s + passed_s if state == "T" else 0.0
        if state in ("T", "t"):  # by a signal, or by a debugger
            return self._found("it was stopped by a signal") if now.stopped_s >= self._terms.floor_s else None
        now.unexamined_s += passed_s
        deadline_s = self._deadline_s()
        begins_s = deadline_s - self._same_for_s - 2 * self._examined_every_s  # so that all is known at the deadline
        if now.still_s < begins_s or now.unexamined_s < self._examined_every_s:
            return None
        elapsed_s, now.unexamined_s = now.unexamined_s, 0.0
        found = self._examine(elapsed_s)
        return found if now.still_s >= deadline_s else None

    def stacks(self) -> str | None:
        """The worker's stacks now; None if it gave a sign of life meanwhile, without having been stopped."""
        if state_of(self._pid) == "T":
            return self._stacks.take_stopped(self.thread)
        text = self._stacks.take(self.thread)
        return text if self._board.read().beats == self._now.reading.beats else None

    def is_still(self) -> bool:
        """Whether it has given no sign of life since it was examined."""
        return state_of(self._pid) == "T" or self._board.read().beats == self._now.reading.beats

    @property
    def thread(self) -> int:
        """The one that trains."""
        return self._now.reading.thread

    def _deadline_s(self) -> float:
        phase = self._now.reading.phase
        if self._past[phase, self._now.reading.step]:
            return self._limit_s()
        return deadline_s(phase, self._board.durations(phase), self._terms)

    def _limit_s(self) -> float:
        """What even a worker that is at work may take in one phase; more where one was ended before, maybe in error."""
        phase, step = self._now.reading.phase, self._now.reading.step
        return longest_wait_s(self._board.durations(phase), self._terms) * 2.0 ** self._past[phase, step]

    def _examine(self, elapsed_s: float) -> Hang | None:
        """A deadline passes soon. Work changes the stack, a hang does not."""
        now = self._now
        if now.reading.phase is Phase.EXCHANGE:
            return self._ask()
        frames = frames_of(self._stacks.take(self.thread), self.thread)
        if now.frames is not None and are_alike(frames, now.frames):
            frames = max(frames, now.frames, key=len)
            now.same_s += elapsed_s
        else:
            now.was_at_work, now.same_s = now.frames is not None, 0.0
        now.frames = frames
        if now.still_s >= self._limit_s() + SAME_FOR_S and now.reading.phase not in PATIENT:
            return self._found("it takes too long")
        does = activity(frames)
        if does is Activity.WAITS and self._orders.world_size > 1:
            return self._ask()
        same_for_s = self._deadline_s() if now.was_at_work else self._same_for_s  # who works may take time
        if does is Activity.OUTSIDE:
            same_for_s = max(same_for_s, OUTSIDE_FOR_S)
        is_hung = now.same_s >= same_for_s and does is not Activity.EXCUSED
        return self._found("nothing changes in it, while it waits for nobody") if is_hung else None

    def _ask(self) -> Hang | None:
        """The worker waits for others: whether it is to blame depends on them, if it can go on at all."""
        desk, reading = self._orders.desk, self._now.reading
        if self._now.locked_s >= max(_LOCKED_FOR_S, self._terms.floor_s):
            return self._found("another thread of it holds the interpreter")
        if desk is None:
            return None
        place = Place(reading.step, reading.exchanges, int(reading.phase))
        host, port = desk
        reason = ask((host, port), self._orders.token, Report(self._orders.rank, place, reading.beats))
        return self._found(reason) if reason else None

    def _found(self, reason: str) -> Hang:
        reading = self._now.reading
        return Hang(reading.phase, reading.step, self._now.still_s, reason)


def state_of(pid: int) -> str:
    """As in /proc: R, S, D, T (stopped), t (traced), Z; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
