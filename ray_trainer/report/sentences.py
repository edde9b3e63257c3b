"""Events of a run as sentences for people, and of which kind they are."""

from collections.abc import Mapping
from typing import Any

from ray_trainer.cluster.working_dir import readable_size
from ray_trainer.report.data import finite
from ray_trainer.report.units import readable_number

LONGEST = 600
_KINDS = {
    "start": ("run_started", "workers_started", "run_finished", "interrupted", "sweep_started", "sweep_ended"),
    "checkpoint": ("checkpoint_saved",),
    "recovery": ("resumed", "rejoined", "rolled_back", "head_back", "sweep_resumed", "trial_took_over", "initialised"),
    "trouble": (
        "failure", "hang", "corruption", "preempted", "controller_lost", "head_lost", "checkpoint_failed",
        "checkpoint_rejected", "out_of_memory", "batch_failed",
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
    return _of_course(event) or _of_checkpoints(event) or _of_failures(event) or _of_numbers(event)


def _of_course(event: Mapping[str, Any]) -> str | None:
    match event:
        case {"event": "run_started"}:
            return "The run was started."
        case {"event": "workers_started", "num_workers": count}:
            again = f" again (attempt {event['attempt']})" if event.get("attempt", 1) > 1 else ""
            return f"{count} worker{'' if count == 1 else 's'} started{again}."
        case {"event": "run_finished", "reason": reason}:
            return f"The run finished: {reason}."
        case {"event": "interrupted", "by": who}:
            return f"The run was stopped by {who}."
        case {"event": "initialised", "source": source, "loaded": count}:
            return f"The weights of {source} were taken over: {count} tensors."
        case {"event": "data_changed", "split": split, "differs": differs, "action": action}:
            return f"The {split} data has changed ({action}): {_listed(differs)}."
        case {"event": "data_quarantined", "split": split, "num_rows": rows, "num_files": files}:
            return f"Of the {split} data, {rows} rows and {files} files are left out because they are bad."
    return None


def _of_checkpoints(event: Mapping[str, Any]) -> str | None:
    match event:
        case {"event": "checkpoint_saved", "checkpoint": name}:
            return f"{name} was saved{_details(event)}."
        case {"event": "checkpoint_rejected", "checkpoint": name, "reason": reason}:
            return f"{name} is broken and was set aside: {reason}."
        case {"event": "checkpoint_failed", "reason": reason}:
            return f"A checkpoint could not be written: {reason}."
        case {"event": "checkpoint_skipped", "reason": reason}:
            return f"A checkpoint was left out: {reason}."
        case {"event": "resumed", "step": step, "from": name}:
            return f"Training went on after step {step} from {name} (tier: {event.get('tier', 'storage')})."
        case {"event": "rejoined", "step": step, "replaced": ranks}:
            return f"Rank {_listed(ranks)} was replaced after step {step}; no step was lost{_waited(event)}."
        case {"event": "rolled_back", "step": step, "to_step": target, "reason": reason}:
            return f"Back from step {step} to the state of step {target}: {reason}."
    return None


def _of_failures(event: Mapping[str, Any]) -> str | None:
    match event:
        case {"event": "failure", "cause": cause}:
            return f"The workers failed: {cause}"
        case {"event": "preempted", "reason": reason}:
            return f"Preempted: {reason}"
        case {"event": "controller_lost" | "head_lost" | "head_back", "reason": reason}:
            return f"{reason}."
        case {"event": "hang", "rank": rank, "phase": phase, "seconds": seconds}:
            lines = event.get("last_lines")
            where = f" at {lines[0]}" if isinstance(lines, list) and lines else ""
            return f"Rank {rank} hung in {phase} for {_number(seconds)} s{where}, and was ended."
        case {"event": "straggler", "rank": rank, "ratio": ratio, "phase": phase}:
            return f"Rank {rank} is slow: {_number(ratio)} times the others, mostly in {phase}."
        case {"event": "corruption", "ranks": ranks, "tensors": tensors}:
            who = f"rank {_listed(ranks)}" if ranks else "an unknown rank"
            return f"Memory or a processor of {who} went wrong, in {_listed(tensors)}."
    return None


def _of_numbers(event: Mapping[str, Any]) -> str | None:
    match event:
        case {"event": "step_skipped"}:
            norm = event.get("gradient_norm")
            return f"The step was skipped: {event.get('reason') or f'gradient norm {norm}'}."
        case {"event": "batch_failed", "rank": rank, "error": error}:
            return f"Training failed at a batch of rank {rank}: {error}."
        case {"event": "batch_quarantined", "samples": samples}:
            return f"The samples {_listed(samples)} are left out from here on: training failed at them twice."
        case {"event": "out_of_memory", "rank": rank, "samples_at_once": count}:
            return f"Out of memory on rank {rank}: from here on {count} samples are processed at once."
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


def _listed(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)


def _number(value: object) -> str:
    number = finite(value)
    return str(value) if number is None else readable_number(round(number, 1))
