"""What happened to a run, in words, for its terminal and its report."""

from collections.abc import Mapping
from typing import Any


def tell(event: Mapping[str, Any]) -> str | None:
    """An event of a run as a sentence for whoever watches it; None for what the progress shows anyway."""
    match event:
        case {"event": "failure", "cause": cause}:
            return f"failure: {cause}"
        case {
            "event": "waiting_for_room" | "preemption" | "preemption_notice" | "controller_lost" | "head_lost",
            "reason": reason,
        }:
            return str(reason)
        case {"event": "workers_started", "num_workers": count, "attempt": attempt} if attempt > 1:
            return f"{count} worker{'' if count == 1 else 's'} started again (attempt {attempt})"
        case {"event": "spare_lost", "cause": cause}:
            return f"a spare worker was lost, training goes on: {cause}"
        case {"event": "resized", "step": step, "from": before, "to": now}:
            return f"workers from step {step} on: {now}, where there were {before}"
        case {"event": "rejoined", "step": step, "replaced": []}:
            return f"no step is lost: the others train on after step {step}"
        case {"event": "rejoined", "step": step, "replaced": replaced}:
            return f"no step is lost: rank {', '.join(map(str, replaced))} was replaced after step {step}"
        case {"event": "resumed", "step": step, "from": checkpoint}:
            return f"resumed at step {step} from {checkpoint}"
        case {"event": "checkpoint_rejected", "checkpoint": checkpoint, "reason": reason}:
            return f"{checkpoint} is broken and set aside: {reason}"
        case {"event": "checkpoint_failed", "reason": reason}:
            return f"a checkpoint could not be written: {reason}"
        case {"event": "data_changed", "split": split, "differs": differs, "action": action}:
            return f"the {split} data has changed ({action}): {'; '.join(differs)}"
        case {"event": "data_quarantined", "split": split, "num_rows": rows, "num_files": files}:
            return f"of the {split} data, {rows} rows and {files} files are left out because they are bad"
        case {"event": "hang", "rank": rank, "phase": phase, "seconds": seconds, "last_lines": lines}:
            where = f" at {lines[0]}" if lines else ""
            return f"rank {rank} hung in {phase} for {seconds:.0f} s{where}, and was ended"
        case {"event": "straggler", "rank": rank, "ratio": ratio, "phase": phase}:
            return f"rank {rank} is slow: {ratio:.1f} times the others, mostly in {phase}"
        case {"event": "step_skipped", "step": step, "gradient_norm": norm}:
            return f"step {step} was skipped: its gradient norm is {norm}"
        case {"event": "batch_quarantined", "step": step, "samples": samples}:
            return f"{len(samples)} samples are left out from step {step} on: training failed at them twice"
        case {"event": "ended_for_memory", "step": step, "rank": rank}:
            return f"rank {rank} was ended in step {step} because memory ran out"
        case {"event": "out_of_memory", "step": step, "rank": rank, "samples_at_once": count}:
            return f"out of memory in step {step} on rank {rank}: from there on {count} samples are processed at once"
        case {"event": "rolled_back", "step": step, "to_step": target, "reason": reason}:
            return f"back from step {step} to the state of step {target}: {reason}"
        case {"event": "corruption", "step": step, "ranks": ranks, "tensors": tensors}:
            who = f"of rank {', '.join(map(str, ranks))}" if ranks else "of an unknown rank"
            return f"memory or a processor {who} went wrong before step {step}, in {', '.join(tensors)}"
    return None
