"""Whether a run trains, has ended or is silent, as its files tell."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]

SILENT_AFTER_S = 120.0  # at least; and five times the longest pause between two signs of life so far
_SAY_NOTHING = ("checkpoint_saved", "checkpoint_rejected")


def run_state(events: Sequence[Row], rows: Sequence[Row], silent_s: float) -> str:
    """``training``, ``finished``, ``stopped``, ``failing`` or ``silent``.

    Args:
        events: of the run, oldest first.
        rows: of its metrics.
        silent_s: since the newest of both.
    """
    last = next((event["event"] for event in reversed(events) if event["event"] not in _SAY_NOTHING), None)
    if last in ("run_finished", "interrupted"):
        return "finished" if last == "run_finished" else "stopped"
    if silent_s > max(SILENT_AFTER_S, 5 * _longest_pause(events, rows)):
        return "silent"
    return "failing" if last == "failure" else "training"


def _longest_pause(events: Sequence[Row], rows: Sequence[Row]) -> float:
    """Between two signs of life of the newest attempt."""
    begun = max((float(event["time"]) for event in events if event["event"] == "workers_started"), default=0.0)
    times = sorted(float(item["time"]) for item in (*events, *rows) if float(item.get("time", 0.0)) >= begun)
    return max((after - before for before, after in pairwise(times)), default=0.0)
