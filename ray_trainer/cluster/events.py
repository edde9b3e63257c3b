"""What the controller sees of a run: which worker failed and why, written down and told."""

import logging
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import UserCallback

from ray_trainer.cluster.link import Link
from ray_trainer.metrics.writers import EventLog
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

#: What a rank reports when it lost another one: a consequence, not the cause.
_CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "connectFullMesh", "Broken pipe")


class FailureRecorder(UserCallback):
    """Runs in Ray's controller, where an exception would end the run; so it raises none."""

    def __init__(self, run_uri: str, link: "ActorHandle[Link] | None") -> None:
        self._run_uri = run_uri
        self._link = link

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the failure of workers. Ray decides what follows."""
        cause = describe_failures(worker_exceptions)
        try:
            EventLog.of_controller(Storage.open(self._run_uri)).record("failure", cause=cause)
            if self._link is not None:
                self._link.announce.remote({"event": "failure", "cause": cause})
        except (OSError, ray.exceptions.RayError) as error:
            logger.warning("The failure of a worker could not be recorded: %s", error)


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
        f"The run failed: {cause}. What was saved is in {storage.uri}; give the same command again to continue from the "
        "newest checkpoint, with a larger cluster.max_failures if such failures are to be expected."
    )


def _line(error: BaseException) -> str:
    """Type and message of the innermost error, without a traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return _line(cause)
    text = str(error).strip()
    last = text.splitlines()[-1].strip() if "Traceback" in text else " ".join(text.split())
    name = type(error).__name__
    return last if last.startswith(name) else f"{name}: {last}"
