"""A worker without Ray and torch that is watched and then does what its first argument says."""

import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from ray_trainer import pulse
from ray_trainer.hang_report import pack
from ray_trainer.pulse import Phase
from ray_trainer.pulse.orders import Orders
from ray_trainer.pulse.watched import Watched
from ray_trainer.storage import Storage

FLOOR_S = 0.6
STEPS = 20


def hold_the_gil() -> None:
    re.match(r"(a?){40}a{40}", "a" * 40)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def work(depth: int = 0) -> None:
    """Slow, but never long at the same place."""
    time.sleep(0.002)
    if depth < 12:
        work(depth + 1)


def work_long() -> None:
    until = time.monotonic() + 8 * FLOOR_S
    while time.monotonic() < until:
        work()


def nap() -> None:
    time.sleep(8 * FLOOR_S)


def wait_for_others() -> None:
    pulse.beat(Phase.EXCHANGE)
    threading.Event().wait(1000)


def skip_an_exchange() -> None:
    pulse.step(STEPS)
    wait_for_others()


def wait_while_another_thread_holds_the_gil() -> None:
    pulse.beat(Phase.EXCHANGE)
    thread = threading.Thread(target=hold_the_gil, daemon=True)
    thread.start()
    thread.join()


ACTIONS = {
    "sleep": (Phase.FORWARD, lambda: time.sleep(1000)),
    "regex": (Phase.DATA, hold_the_gil),
    "stop": (Phase.SAVE, stop),
    "work": (Phase.HOOK, work_long),
    "excused": (Phase.FORWARD, nap),
    "save": (Phase.SAVE, nap),
    "wait": (Phase.BACKWARD, wait_for_others),
    "skip": (Phase.BACKWARD, skip_an_exchange),
    "thread": (Phase.BACKWARD, wait_while_another_thread_holds_the_gil),
}


def main(action: str, run_dir: str, desk: str = "") -> None:
    """Take some usual steps, then the action.

    Args:
        action: a key of `ACTIONS`.
        run_dir: where a hang is recorded.
        desk: file in which one of two ranks, the one that waits, tells its port to the other.
    """
    watched = Watched()
    listener, port = meet(action, desk) if desk else (None, 0)
    orders = Orders(
        rank=int(action == "skip"),
        world_size=2 if desk else 1,
        floor_s=FLOOR_S,
        patience_s=1000.0,
        past=[(Phase.FORWARD, STEPS - 1)] if action == "excused" else [],
        desk=("127.0.0.1", port) if desk else None,
        token="secret",
        storage=pack(Storage.open(run_dir)),
    )
    with watched.alive():
        monitor = watched.be_watched(orders, None if listener is None else listener.fileno())
        for step in range(STEPS):
            pulse.step(step)
            for phase in Phase:
                pulse.beat(phase)
        Path(run_dir, "monitor").write_text(str(monitor))
        phase, act = ACTIONS[action]
        pulse.beat(phase)
        act()


def meet(action: str, desk: str) -> tuple[socket.socket | None, int]:
    if action == "wait":
        listener = socket.create_server(("127.0.0.1", 0))
        Path(f"{desk}.tmp").write_text(str(listener.getsockname()[1]))
        Path(f"{desk}.tmp").rename(desk)
        return listener, listener.getsockname()[1]
    while not Path(desk).exists():
        time.sleep(0.01)
    return None, int(Path(desk).read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
