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
from typing import Any

from ray_trainer.pulse.descent import die_with, ignore_interruptions
from ray_trainer.pulse.desk import Desk, serve
from ray_trainer.pulse.orders import Assignment
from ray_trainer.pulse.stacks import frames_of
from ray_trainer.pulse.watch import Hang, Watch

logger = logging.getLogger(__name__)

_TICK_S = 0.25
#: More than this does not pass between two looks, whatever the clock says: this process was held up as well.
_LONGEST_TICK_S = 1.0
_RECORDED_WITHIN_S = 15.0
_NUM_LAST_LINES = 5


def watch(assignment: Assignment) -> None:
    """Until the worker is gone, or has to go."""
    watched = Watch(assignment)
    before = time.monotonic()
    while os.getppid() == assignment.pid:
        time.sleep(_TICK_S)
        now = time.monotonic()
        hang = watched.look(min(now - before, _LONGEST_TICK_S))
        before = now
        stacks = watched.stacks() if hang is not None else None
        if hang is not None and stacks is not None:
            report(assignment, hang, stacks, watched.thread)
            if os.getppid() == assignment.pid and watched.is_still():  # recording may have taken a while
                os.kill(assignment.pid, signal.SIGKILL)
                os.kill(assignment.pid, signal.SIGCONT)


def report(assignment: Assignment, hang: Hang, stacks: str, thread: int) -> None:
    """Tell of a hang, in the log and in the run's directory.

    Args:
        assignment: whose worker it is.
        hang: what was found.
        stacks: of all threads.
        thread: the one that trains.
    """
    orders, phase = assignment.orders, hang.phase.name.lower()
    last = [str(frame) for frame in frames_of(stacks, thread)[:_NUM_LAST_LINES]]
    logger.error(
        "Rank %d hangs: %.0f s without a sign of life in %s after step %d; %s (%s). It is ended.",
        *(orders.rank, hang.seconds, phase, hang.step, hang.reason, last[0] if last else "its stack is not known"),
    )
    details = {
        "rank": orders.rank,
        "phase": phase,
        "seconds": round(hang.seconds, 1),
        "reason": hang.reason,
        "host": socket.gethostname(),
        "pid": assignment.pid,
        "last_lines": last,
    }
    _record({"storage": orders.storage, "step": hang.step, "details": details, "stacks": stacks})


def _record(hang: dict[str, Any]) -> None:
    """Through a process of its own: storage may be what hangs."""
    command = [sys.executable, "-S", "-P", "-m", "ray_trainer.hang_report"]
    try:
        subprocess.run(command, input=json.dumps(hang), text=True, timeout=_RECORDED_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("The hang could not be recorded with the run: %s", error)


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
