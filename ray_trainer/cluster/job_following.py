"""A Ray job from its submission to its end: its log, a wish to stop it, its exit code."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_trainer.errors import RunError
from ray_trainer.runtime import Stop

POLL_INTERVAL_S = 0.5
UNREACHABLE_S = 600.0
#: What Ray's client raises where the cluster does not answer; `requests` has subclasses of OSError.
LOST = (OSError, aiohttp.ClientError, RuntimeError)

_EXIT_CODES = (1, 2, 130, 143)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        exit_code: as of ``ray-trainer train``.
        reason: where there is more to tell.
    """

    exit_code: int
    reason: str = ""

    @property
    def advice(self) -> str:
        """How to go on after it, unless the exit code is 0."""
        if self.exit_code == 2:
            return "Correct what it names, then give the command again."
        return "Give the same command again to continue its run."


def follow(
    client: JobSubmissionClient, submission_id: str, write: Callable[[str], None], wish: Callable[[], Stop]
) -> JobEnd:
    """Pass on a job's log until it ends; a wish to stop goes to the job, whose end is waited for.

    Args:
        client: of the cluster.
        submission_id: of the job.
        write: takes pieces of the log, in a thread of its own.
        wish: asked twice a second.

    Raises:
        RunError: the cluster did not answer for `UNREACHABLE_S`; the job may still run.
    """
    log = _LogStream(client, submission_id, write)
    asked = Stop.NONE
    answered_at = time.monotonic()
    while True:
        try:
            if asked is Stop.NONE and (asked := wish()) is not Stop.NONE:
                asked = _ask_to_stop(client, submission_id, asked)
            info = client.get_job_info(submission_id)
            answered_at = time.monotonic()
            if info.status.is_terminal():
                log.finish()
                return ending(info, asked)
        except LOST as error:
            if time.monotonic() - answered_at > UNREACHABLE_S:
                raise RunError(
                    f"The cluster has not answered for {UNREACHABLE_S:.0f} s ({error}). Job {submission_id} may still "
                    "run; give the same command again to follow it, or to continue its run."
                ) from error
        time.sleep(POLL_INTERVAL_S)


def ending(info: JobDetails, asked: Stop) -> JobEnd:
    """The exit code of a job that has ended, and what there is to tell.

    Args:
        info: of the job.
        asked: what this client wished.
    """
    if info.status == JobStatus.SUCCEEDED:
        return JobEnd(0)
    if info.status == JobStatus.STOPPED:
        return JobEnd(130 if asked is Stop.SIGINT else 143, "It was stopped.")
    code = info.driver_exit_code
    if code in _EXIT_CODES:
        return JobEnd(code)
    if code is None:
        return JobEnd(1, str(info.message or "Ray does not say why."))
    if code < 0:
        return JobEnd(1, f"Its driver was killed by signal {-code}.")
    advice = " There is no such Python on the cluster; name one with --python." if code == 127 else ""
    return JobEnd(1, f"Its command ended with code {code}.{advice}")


def _ask_to_stop(client: JobSubmissionClient, submission_id: str, wish: Stop) -> Stop:
    try:
        client.stop_job(submission_id)
    except LOST:
        return Stop.NONE  # asked again at the next round
    return wish


class _LogStream:
    """A thread that passes on a job's log, and begins again where it was after the connection was lost."""

    def __init__(self, client: JobSubmissionClient, submission_id: str, write: Callable[[str], None]) -> None:
        self._client = client
        self._id = submission_id
        self._write = write
        self._written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-trainer-job-log", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The job has ended: write what is left."""
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            was_over = self._ended.is_set()
            try:
                asyncio.run(self._tail())
                is_whole = True
            except LOST:
                is_whole = False
            if was_over or (self._ended.wait(POLL_INTERVAL_S) and is_whole):
                return

    async def _tail(self) -> None:
        seen = 0  # of this connection, which begins at the log's beginning
        async for text in self._client.tail_job_logs(self._id):
            fresh = text[max(0, self._written - seen) :]
            seen += len(text)
            if fresh:
                self._written += len(fresh)
                self._write(fresh)
