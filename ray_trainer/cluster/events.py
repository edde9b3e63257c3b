"""What the controller sees of a run: which worker failed and why, written down and told."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import UserCallback

from ray_trainer.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    LeaseLostError,
    RayTrainerError,
    StateMismatchError,
)
from ray_trainer.metrics import EventLog
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

#: What a rank reports when it lost another one: a consequence, not the cause.
_CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "connectFullMesh", "Broken pipe")


#: What no restart can mend.
FINAL_ERRORS = (ConfigError, DataError, DivergenceError, LeaseLostError, StateMismatchError)


class FailureRecorder(UserCallback):
    """Runs in Ray's controller, where an exception ends the run: only one that no restart can mend is raised."""

    def __init__(self, run: Storage, link: ActorHandle | None) -> None:
        self._run = run
        self._link = link

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the failure of workers. Ray decides what follows."""
        cause = describe_failures(worker_exceptions)
        try:
            EventLog.of_controller(self._run).record("failure", cause=cause, traceback=_tracebacks(worker_exceptions))
            if self._link is not None:
                self._link.announce.remote({"event": "failure", "cause": cause})
        except (OSError, LeaseLostError, ray.exceptions.RayError) as error:
            logger.warning("The failure of a worker could not be recorded: %s", error)
        for failure in worker_exceptions.values():
            final = final_error(failure)
            if final is not None:
                raise ray.train.ControllerError(final)  # the one kind that Ray neither retries nor logs


def _tracebacks(failures: Mapping[int, BaseException]) -> dict[str, str]:
    """The notes of the ranks' errors, to which a worker adds where in the code it happened."""
    return {str(rank): "\n".join(error.__notes__) for rank, error in failures.items() if hasattr(error, "__notes__")}


def tell(event: Mapping[str, Any]) -> str | None:
    """An event of a run as a sentence for whoever watches it; None for what the progress shows anyway."""
    match event:
        case {"event": "failure", "cause": cause}:
            return f"failure: {cause}"
        case {"event": "workers_started", "num_workers": count, "attempt": attempt} if attempt > 1:
            return f"{count} workers started again (attempt {attempt})"
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
        case {"event": "step_skipped", "step": step, "gradient_norm": norm}:
            return f"step {step} was skipped: its gradient norm is {norm}"
        case {"event": "batch_quarantined", "step": step, "samples": samples}:
            return f"{len(samples)} samples are left out from step {step} on: training failed at them twice"
        case {"event": "out_of_memory", "step": step, "rank": rank, "samples_at_once": count}:
            return f"out of memory in step {step} on rank {rank}: from there on {count} samples are processed at once"
        case {"event": "rolled_back", "step": step, "to_step": target, "reason": reason}:
            return f"back from step {step} to the state of step {target}: {reason}"
        case {"event": "corruption", "step": step, "ranks": ranks, "tensors": tensors}:
            who = f"of rank {', '.join(map(str, ranks))}" if ranks else "of an unknown rank"
            return f"memory or a processor {who} went wrong before step {step}, in {', '.join(tensors)}"
    return None


def final_error(error: BaseException) -> RayTrainerError | None:
    """The error that no restart can mend, if this is one, out of what Ray has put around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FINAL_ERRORS):
            return None if isinstance(seen, DataError) and seen.is_transient else seen
        inner = getattr(seen, "cause", None) or getattr(seen, "controller_failure", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return None


def describe_failures(failures: Mapping[int, BaseException]) -> str:
    """The cause among the errors of several ranks, in a line: a rank that merely lost another one is not it."""
    lines = {rank: _line(error) for rank, error in sorted(failures.items())}
    causes = {r: line for r, line in lines.items() if not any(mark in line for mark in _CONSEQUENCES)} or lines
    return "; ".join(f"rank {rank}: {line}" for rank, line in causes.items())


def explain_failure(error: BaseException, storage: Storage) -> str:
    """One paragraph for a user: what happened, and how to go on."""
    if isinstance(error, ray.train.WorkerGroupError):
        cause = describe_failures(error.worker_failures)
    elif isinstance(error, ray.train.ControllerError):
        cause = _line(error.controller_failure)
    else:
        cause = _line(error)
    return (
        f"The run failed: {cause}. What was saved is in {storage.uri}; give the same command again to continue "
        "from the newest checkpoint, with a larger cluster.max_failures if such failures are to be expected."
    )


def _line(error: BaseException) -> str:
    """Type and message of the innermost error, without a traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return _line(cause)
    text = str(error).strip()
    if "worker process has died" in text or "actor died" in text.lower():
        return f"the worker process died{_found(r'pid[:=] ?([0-9]+)', text, ' (pid {})')}{_exit_detail(text)}"
    last = text.splitlines()[-1].strip() if "Traceback" in text else " ".join(text.split())
    name = type(error).__name__
    return last if last.startswith(name) else f"{name}: {last}"


def _exit_detail(text: str) -> str:
    """What Ray knows of the end of a process, without its advice."""
    return _found(r"Worker exit detail: (.*?)(?: Some common causes|\.\s|$)", " ".join(text.split()), ": {}")


def _found(pattern: str, text: str, form: str) -> str:
    match = re.search(pattern, text)
    return form.format(match[1].strip()) if match else ""
