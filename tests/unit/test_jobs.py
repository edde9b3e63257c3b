"""What of jobs needs no cluster: names, the environment, exit codes."""

from pathlib import Path

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from ray_trainer.cluster.job_following import ending
from ray_trainer.cluster.jobs import JOB_ENVIRONMENT, connect, free_id, runtime_environment
from ray_trainer.errors import ConfigError
from ray_trainer.runtime import Stop


def details(status: JobStatus, code: int | None = None, message: str | None = None) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, status=status, entrypoint="exec python", driver_exit_code=code, message=message
    )


def test_finished_jobs_keep_their_ids_and_the_next_gets_a_number():
    assert free_id("digits", set()) == "digits"
    assert free_id("digits", {"digits"}) == "digits-2"
    assert free_id("digits", {"digits", "digits-2", "digits-4"}) == "digits-3"
    assert free_id("my run", {"my-run"}) == "my-run-2"


@pytest.mark.parametrize("code", [1, 2, 130, 143])
def test_exit_code_of_the_training_is_handed_on(code):
    assert ending(details(JobStatus.FAILED, code), Stop.NONE).exit_code == code


def test_who_has_to_correct_something_is_not_told_to_give_the_same_command_again():
    wrong, failed = (ending(details(JobStatus.FAILED, code), Stop.NONE) for code in (2, 1))

    assert wrong.advice == "Correct what it names, then give the command again."
    assert failed.advice == "Give the same command again to continue its run."


def test_job_that_was_stopped_ends_as_whoever_stopped_it():
    stopped = details(JobStatus.STOPPED)

    assert ending(details(JobStatus.SUCCEEDED, 0), Stop.NONE).exit_code == 0
    assert ending(stopped, Stop.SIGINT).exit_code == 130
    assert ending(stopped, Stop.SIGTERM).exit_code == 143
    assert ending(stopped, Stop.NONE).exit_code == 143  # by `ray job stop`


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (None, "runtime_env setup failed: no pip", "runtime_env setup failed: no pip"),
        (-9, None, "killed by signal 9"),
        (127, None, "--python"),
        (3, None, "code 3"),
    ],
)
def test_other_ends_are_failures_that_say_why(code, message, reason):
    end = ending(details(JobStatus.FAILED, code, message), Stop.NONE)

    assert end.exit_code == 1
    assert reason in end.reason


def test_files_and_this_package_are_pinned_and_the_users_settings_are_kept():
    users = {"pip": ["sklearn"], "env_vars": {"A": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, "excludes": ["*.bin"]}

    environment = runtime_environment(users, Path("/tmp/package.zip"))

    assert environment["working_dir"] == "/tmp/package.zip"
    assert Path(environment["py_modules"][0], "cluster", "jobs.py").is_file()
    assert environment["pip"] == ["sklearn"]
    assert environment["env_vars"] == {**JOB_ENVIRONMENT, "A": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "*.bin" in environment["excludes"]


def test_address_where_nobody_listens_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")

    with pytest.raises(ConfigError, match=r"(?s)127\.0\.0\.1:1'.*no Ray dashboard.*http://HOST:8265.*RAY_AUTH_MODE"):
        connect("127.0.0.1:1")
