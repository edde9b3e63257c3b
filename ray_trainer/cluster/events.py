"""What the controller sees of a run: which worker failed and why, written down and told."""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import UserCallback

from ray_trainer import distributed
from ray_trainer.checkpoint.catalog import newest_step
from ray_trainer.cluster.retries import Episodes, Pauses, Repetitions, Retries
from ray_trainer.errors import (
    CheckpointCorruptError,
    ConfigError,
    DataError,
    DivergenceError,
    LeaseLostError,
    MemoryShortageError,
    RayTrainerError,
    RepeatedFailureError,
    StateMismatchError,
)
from ray_trainer.metrics import EventLog, read_events
from ray_trainer.metrics.events import next_attempt
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

#: What no restart can mend.
FINAL_ERRORS = (
    CheckpointCorruptError,
    ConfigError,
    DataError,
    DivergenceError,
    LeaseLostError,
    RepeatedFailureError,
    StateMismatchError,
)
_ANSWER_WITHIN_S = 5.0
_LOOKS_EVERY_S = 0.5
#: What Ray's memory monitor says of a worker that it has ended: an `OutOfMemoryError`, which is no `RayActorError`.
_LOW_MEMORY = re.compile(
    r"killed due to the node running low on memory(?:\. Memory on the node \(IP: ([^,)]+)[^)]*\) was (.+? limit))?"
)


class FailureRecorder(UserCallback):
    """Runs in Ray's controller, where an exception ends the run: only one that no restart can mend is raised.

    Args:
        run: the run's directory, fenced.
        link: to the driver.
        max_failures: in a row, during which training got no further; -1 for any number.
        leaves_out: a batch that fails twice is left out from then on, so that failing twice is no reason to end.
        ranks_of: which ranks the workers at these places of Ray's have; None for a spare, which is not missed. By
            default place and rank are the same.
    """

    def __init__(
        self,
        run: Storage,
        link: ActorHandle,
        max_failures: int,
        leaves_out: bool = False,
        ranks_of: Callable[[Collection[int]], Mapping[int, int | None]] | None = None,
    ) -> None:
        self._run = run
        self._link = link
        self._hangs_told = 0
        self._retries = Retries(max_failures)
        self._leaves_out = leaves_out
        self._repetitions = Repetitions()
        self._episodes = Episodes()
        self._pauses = Pauses()
        self._ranks_of = ranks_of or (lambda places: {place: place for place in places})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the failure of workers, and end the run where another start would fail as well."""
        ranks = self._ranks_of(worker_exceptions.keys())
        failures = {rank: error for place, error in worker_exceptions.items() if (rank := ranks[place]) is not None}
        for place, error in worker_exceptions.items():
            if ranks[place] is None:
                record(self._run, self._link, "spare_lost", cause=_line(error))
        if not failures:
            self._pause(worker_exceptions.keys())
            return
        errors = causes(failures)
        cause = describe_failures(failures)
        for hang in self._new_hangs():
            self._link.announce.remote(hang)
        short = [rank for rank, error in failures.items() if _LOW_MEMORY.search(str(error))]
        details = {"out_of_memory": short} if short else {}
        record(self._run, self._link, "failure", cause=cause, traceback=_tracebacks(failures), **details)
        final: RayTrainerError | None = next(filter(None, map(final_error, failures.values())), None)
        final = final or self._hopeless(errors, cause, failures.keys())
        if final is not None:
            raise ray.train.ControllerError(final)  # the one kind that Ray neither retries nor logs

    def _pause(self, places: Collection[int]) -> None:
        """Delay what Ray does next, which is to replace spares, as long as nobody misses a worker there."""
        until_s = time.monotonic() + self._pauses.after_loss()
        while time.monotonic() < until_s and set(self._ranks_of(places).values()) == {None}:
            time.sleep(_LOOKS_EVERY_S)

    def _hopeless(
        self, errors: Mapping[int, BaseException], cause: str, ranks: Collection[int]
    ) -> RepeatedFailureError | None:
        """Why the run will fail again, if it will."""
        again = self._repetitions.find(errors)
        is_shortage = again is not None and isinstance(errors[again], MemoryShortageError)
        if again is not None and (is_shortage or not self._leaves_out):
            traceback, step = errors[again].__notes__[-2:]
            explanation = errors[again] if is_shortage else traceback.rstrip()
            return RepeatedFailureError(
                f"{explanation}\n\nThis came twice at the same place, {step}, so it would come after every "
                f"restart. Correct its cause and give the same command again: {what_is_kept(self._run)}"
            )
        is_new = self._episodes.is_new(_attempt(self._run), ranks)
        if not is_new or self._retries.allow(furthest_step(self._run, self._link)):
            return None
        return RepeatedFailureError(
            f"The run failed again and again without getting any further: {cause}. Correct the cause, or raise "
            f"cluster.max_failures if such failures are to be expected, and give the same command again: "
            f"{what_is_kept(self._run)}"
        )

    def _new_hangs(self) -> list[dict[str, Any]]:
        """Those that the monitors have recorded since the last failure."""
        try:
            hangs = [row for row in read_events(self._run) if row["event"] == "hang"]
        except OSError:
            return []  # what has happened is in the file all the same
        new, self._hangs_told = hangs[self._hangs_told :], len(hangs)
        return new


def _attempt(run: Storage) -> int:
    try:
        return next_attempt(run)
    except OSError:
        return -1


def record(run: Storage, link: ActorHandle, event: str, **details: Any) -> None:
    """Write an event down and tell who watches; what can't be recorded does not end the run."""
    try:
        EventLog.of_controller(run).record(event, **details)
        link.announce.remote(
            {"event": event, **{name: value for name, value in details.items() if name != "traceback"}}
        )
    except (OSError, LeaseLostError, ray.exceptions.RayError) as error:
        logger.warning("The event %s could not be recorded: %s", event, error)


def furthest_step(run: Storage, link: ActorHandle) -> int:
    """The last step that is known to be completed: as the workers told it, or as storage has it.

    What they tell comes twice a second, and a run may get a few steps further between two failures that are closer.
    """
    try:
        told = int(ray.get(link.newest_step.remote(), timeout=_ANSWER_WITHIN_S))
    except ray.exceptions.RayError:
        told = 0  # the link has just been started again
    try:
        return max(told, furthest_on_storage(run))
    except OSError:
        return told


def furthest_on_storage(run: Storage) -> int:
    """The last step that a checkpoint has, or that workers went on from, which a survivor may have had alone.

    Raises:
        OSError: storage cannot be read.
    """
    resumed = (int(row.get("step", 0)) for row in read_events(run) if row["event"] == "resumed")
    return max(newest_step(run), *resumed, 0)


def what_is_kept(storage: Storage) -> str:
    """Tells a user whose run has failed that nothing is lost."""
    return f"what was saved is in {storage.uri}, and the run goes on from its newest checkpoint."


def _tracebacks(failures: Mapping[int, BaseException]) -> dict[str, str]:
    """The notes of the ranks' errors, to which a worker adds where in the code it happened."""
    return {str(rank): "\n".join(error.__notes__) for rank, error in failures.items() if hasattr(error, "__notes__")}


def final_error(error: BaseException) -> RayTrainerError | None:
    """The error that no restart can mend, if this is one, out of what Ray has put around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FINAL_ERRORS):
            return None if isinstance(seen, DataError) and seen.is_transient else seen
        inner = getattr(seen, "cause", None) or getattr(seen, "controller_failure", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return None


def causes(failures: Mapping[int, BaseException]) -> dict[int, BaseException]:
    """The causes among the errors of several ranks: a rank that merely lost another one is not it."""
    ordered = dict(sorted(failures.items()))
    own = {rank: error for rank, error in ordered.items() if not distributed.blames_another(_line(error))}
    return own or ordered


def describe_failures(failures: Mapping[int, BaseException]) -> str:
    """The causes among the errors of several ranks, in a line."""
    return "; ".join(f"{_who(rank)}: {_line(error)}" for rank, error in causes(failures).items())


def _who(rank: int) -> str:
    return f"rank {rank}" if rank >= 0 else "a worker that was starting"


def explain_failure(error: BaseException, storage: Storage) -> str:
    """One paragraph for a user: what happened, and how to go on."""
    if isinstance(error, ray.train.WorkerGroupError):
        cause = describe_failures(error.worker_failures)
    elif isinstance(error, ray.train.ControllerError):
        cause = _line(error.controller_failure)
    else:
        cause = _line(error)
    return f"The run failed: {cause}. Give the same command again to continue: {what_is_kept(storage)}"


def _line(error: BaseException) -> str:
    """Type and message of the innermost error, without a traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return _line(cause)
    failure = getattr(error, "health_check_failure", None)
    if isinstance(failure, ray.exceptions.ActorUnavailableError):  # it may be alive, and is ended
        return f"Ray's controller could not reach the worker: {' '.join(str(failure).split())}"
    text = str(error).strip()
    if low := _LOW_MEMORY.search(text):
        place = f" ({low[1]}: {low[2]})" if low[1] else ""
        return (
            f"Ray ended the worker process because its node ran out of memory{place}: lower batch_size, which "
            "on_out_of_memory 'halve' does after the second time, or let less run on the node"
        )
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
