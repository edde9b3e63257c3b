"""Runs as Ray jobs, submitted with their files; the same job twice trains once."""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from ray_trainer.cluster.job_following import LOST
from ray_trainer.cluster.working_dir import PackedFile, write_package
from ray_trainer.errors import ConfigError, RunError

#: What every job gets in its environment; the user's own ``env_vars`` win.
JOB_ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": "600",  # from SIGTERM to SIGKILL; 3 s, Ray's own, are too short for a large checkpoint
    "PYTHONHASHSEED": "0",  # sets of strings are iterated in the same order at each start, so data is built the same
}

_CHATTY = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
_AUTHENTICATION = (
    "If the cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what the "
    "head node keeps in ~/.ray/auth_token."
)


@dataclass(frozen=True)
class JobRequest:
    """What is to run.

    Attributes:
        name: of the job; a number is added where a finished job has it already.
        run: what it writes to; two jobs never do so at the same time.
        entrypoint: shell command.
        working_dir: its files go along, but for what is ignored.
        runtime_env: further settings of Ray's runtime environment.
        driver_cpus: reserved for its driver, which then runs where they are; with 0 it runs on the head.
    """

    name: str
    run: str
    entrypoint: str
    working_dir: Path
    runtime_env: Mapping[str, Any]
    driver_cpus: float = 0.0


@dataclass(frozen=True)
class Submission:
    """A job on the cluster.

    Attributes:
        id: Ray's submission id.
        is_new: false if just this job ran already, and nothing was submitted.
        files: what went along.
    """

    id: str
    is_new: bool
    files: list[PackedFile]


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's dashboard.

    Raises:
        ConfigError: nobody answers there, or it does not let this process in.
    """
    url = address if "://" in address else f"http://{address}"
    for name in _CHATTY:
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        with _without_rays_own_choice():
            return JobSubmissionClient(url)
    except (*LOST, AuthenticationError, ValueError) as error:
        raise ConfigError(
            f"--address = {address!r}: no Ray dashboard could be reached there ({error}). Give the URL that 'ray start "
            "--head' prints, such as http://HOST:8265; a cluster in Kubernetes is reached through 'kubectl "
            f"port-forward service/NAME-head-svc 8265'. {_AUTHENTICATION}"
        ) from error


def submit(client: JobSubmissionClient, request: JobRequest) -> Submission:
    """Submit a job, or find the one that runs already: giving the same command twice trains once.

    Raises:
        ConfigError: the working directory is too large, Ray refuses the runtime environment, or a job with other
            files or another command writes to the same run.
        RunError: the cluster could not be asked.
    """
    with tempfile.TemporaryDirectory(prefix="ray-trainer-") as scratch:
        package = Path(scratch, "working_dir.zip")
        files = write_package(request.working_dir, package)
        runtime_env = runtime_environment(request.runtime_env, package)
        metadata = _metadata(request, package)
        refused: set[str] = set()
        while True:
            jobs = [job for job in _reach(client.list_jobs) if job.submission_id]
            running = _same_run(jobs, request, metadata)
            if running is not None:
                return Submission(str(running.submission_id), is_new=False, files=files)
            submission_id = free_id(request.name, refused | {str(job.submission_id) for job in jobs})
            try:
                client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=submission_id,
                    runtime_env=runtime_env,
                    metadata=dict(metadata),
                    entrypoint_num_cpus=request.driver_cpus or None,
                )
            except (*LOST, ValueError, TypeError) as error:
                if "already exists" not in str(error):
                    raise ConfigError(f"The job was refused: {error}") from error
                refused.add(submission_id)  # somebody else was faster, maybe with this very job
            else:
                return Submission(submission_id, is_new=True, files=files)


def runtime_environment(users: Mapping[str, Any], package: Path) -> dict[str, Any]:
    """What is pinned: the job's files and this version of ray_trainer by content, and `JOB_ENVIRONMENT`.

    Libraries are those of the cluster, unless the user's own part says otherwise (``pip``, ``uv``, ``image_uri``).
    """
    return {
        **users,
        "working_dir": str(package),
        "py_modules": [str(Path(__file__).parents[1]), *(users.get("py_modules") or ())],
        "excludes": ["__pycache__/", *(users.get("excludes") or ())],
        "env_vars": {**JOB_ENVIRONMENT, **(users.get("env_vars") or {})},
    }


def free_id(name: str, taken: set[str]) -> str:
    """``name``, or ``name-2``, ``name-3`` ...: Ray never takes an id twice, not even of a finished job."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    number = 1
    while (candidate := plain if number == 1 else f"{plain}-{number}") in taken:
        number += 1
    return candidate


def _same_run(jobs: list[JobDetails], request: JobRequest, metadata: Mapping[str, str]) -> JobDetails | None:
    """The job that writes to the run now, if it is just this one."""
    for job in jobs:
        known = job.metadata or {}
        is_related = any(known.get(name) == metadata[name] for name in ("ray_trainer_run", "ray_trainer_name"))
        if job.status.is_terminal() or not is_related:
            continue
        if job.entrypoint == request.entrypoint and known.get("ray_trainer_content") == metadata["ray_trainer_content"]:
            return job
        raise ConfigError(
            f"Job {job.submission_id} is {job.status.lower()} and writes to the same run, with other files or "
            f"another command ({job.entrypoint}). Stop it with 'ray job stop {job.submission_id}' first, or give "
            "this one another cluster.name and --name."
        )
    return None


def _metadata(request: JobRequest, package: Path) -> dict[str, str]:
    """How a job is known again; shown in Ray's dashboard as well."""
    digest = hashlib.sha256(package.read_bytes())
    digest.update(json.dumps(request.runtime_env, sort_keys=True, default=str).encode())
    return {
        "ray_trainer_name": request.name,
        "ray_trainer_run": request.run,
        "ray_trainer_content": digest.hexdigest()[:32],
    }


def _reach(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except LOST as error:
        raise RunError(f"The cluster does not answer: {error}. Nothing was submitted; try again.") from error


@contextmanager
def _without_rays_own_choice() -> Iterator[None]:
    """Ray takes these variables over an address that is given; ours are read where options are."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
