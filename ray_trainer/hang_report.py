"""Writes down that a worker hung: its stacks and an event, with the run. A short-lived process of its own."""

import base64
import json
import pickle
import sys
from typing import Any

from ray_trainer.metrics.events import EventLog, next_attempt, read_events
from ray_trainer.storage import Storage

STACKS = "stacks"


def pack(storage: Storage) -> str:
    """A directory in a form that goes through a pipe as text."""
    return base64.b64encode(pickle.dumps(storage)).decode()


def record(storage: Storage, step: int, details: dict[str, Any], stacks: str) -> None:
    """Record a ``hang``: ``rank``, ``phase``, ``seconds``, ``stack`` (the file, in the run's directory) and so on."""
    attempt = max(1, next_attempt(storage) - 1)
    name = f"attempt{attempt:04d}_step{step:08d}_rank{details['rank']:05d}.txt"
    if stacks:
        storage.child(STACKS).write(name, stacks.encode())
    log = EventLog(storage, attempt, writer=f"monitor{details['rank']}")
    log.record("hang", step, **details, stack=f"{STACKS}/{name}" if stacks else None)


def past_hangs(storage: Storage) -> list[tuple[str, int]]:
    """Phase and step of each hang of a run so far."""
    hangs = (event for event in read_events(storage) if event["event"] == "hang")
    return [(str(event["phase"]), int(event["step"])) for event in hangs]


def main() -> None:
    """Take a hang from the monitor."""
    hang = json.load(sys.stdin)
    storage: Storage = pickle.loads(base64.b64decode(hang["storage"]))
    record(storage, hang["step"], hang["details"], hang["stacks"])


if __name__ == "__main__":
    main()
