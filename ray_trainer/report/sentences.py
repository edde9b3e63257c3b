"""Events of a run as sentences for people, and of which kind they are."""

from collections.abc import Mapping
from typing import Any

from ray_trainer.cluster.working_dir import readable_size
from ray_trainer.narration import tell
from ray_trainer.report.data import finite

LONGEST = 600
_KINDS = {
    "start": ("run_started", "workers_started", "run_finished", "interrupted", "sweep_started", "sweep_ended"),
    "checkpoint": ("checkpoint_saved",),
    "recovery": (
        "resumed", "rejoined", "resized", "rolled_back", "head_back", "sweep_resumed", "trial_took_over", "initialised",
    ),
    "trouble": (
        "failure", "waiting_for_room", "spare_lost", "hang", "corruption", "preemption", "preemption_notice",
        "controller_lost", "head_lost",
        "checkpoint_failed", "checkpoint_rejected", "out_of_memory", "ended_for_memory",
        "batch_failed",
    ),
}  # fmt: skip
_KIND_OF = {event: kind for kind, events in _KINDS.items() for event in events}
_SHOWN_APART = ("time", "event", "attempt", "step", "epoch", "traceback", "non_finite", "pids")


def kind_of(event: str) -> str:
    """``start``, ``checkpoint``, ``recovery``, ``trouble`` or ``note``."""
    return _KIND_OF.get(event, "note")


def sentence(event: Mapping[str, Any]) -> str:
    """What happened, in a sentence; an event that is not known as its name and details."""
    text = _known(event) or _plainly(event)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _known(event: Mapping[str, Any]) -> str | None:
    """As the terminal tells it, if it does; else what only a report has room for."""
    try:
        told = tell(event)
    except (TypeError, ValueError):  # a value that is not what this version writes there
        return None
    return _of_course(event) if told is None else f"{told[:1].upper()}{told[1:]}{_waited(event)}."


def _of_course(event: Mapping[str, Any]) -> str | None:
    match event:
        case {"event": "run_started"}:
            return "The run was started."
        case {"event": "workers_started", "num_workers": count}:
            return f"{count} worker{'' if count == 1 else 's'} started."
        case {"event": "run_finished", "reason": reason}:
            return f"The run finished: {reason}."
        case {"event": "interrupted", "by": who}:
            return f"The run was stopped by {who}."
        case {"event": "initialised", "source": source, "loaded": count}:
            return f"The weights of {source} were taken over: {count} tensors."
        case {"event": "checkpoint_saved", "checkpoint": name}:
            return f"{name} was saved{_details(event)}."
        case {"event": "checkpoint_skipped", "reason": reason}:
            return f"A checkpoint was left out: {reason}."
        case {"event": "head_back", "reason": reason}:
            return f"{reason}."
        case {"event": "batch_failed", "rank": rank, "error": error}:
            return f"Training failed at a batch of rank {rank}: {error}."
    return None


def _plainly(event: Mapping[str, Any]) -> str:
    name = str(event.get("event", "event")).replace("_", " ")
    details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in _SHOWN_APART)
    return f"{name}: {details}" if details else name


def _details(event: Mapping[str, Any]) -> str:
    size, stall_s = finite(event.get("size_bytes")), finite(event.get("stall_s"))
    parts = [] if size is None else [readable_size(size)]
    parts += [] if stall_s is None else [f"training waited {stall_s:.2f} s"]
    return f" ({', '.join(parts)})" if parts else ""


def _waited(event: Mapping[str, Any]) -> str:
    waited_s = finite(event.get("waited_s"))
    return "" if waited_s is None else f", {waited_s:.0f} s were waited"
