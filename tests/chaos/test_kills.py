"""`ray-trainer train`, killed and stopped in the middle of an epoch, ends as if nothing had happened."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_runs import (
    OUTLIVING,
    Command,
    assert_same_run,
    assert_times_add_up,
    kill,
    newest_checkpoint,
    step_of,
    training,
    whole_lines,
)
from digits_run import EPOCHS, KILL_AT_STEP, STEPS_AN_EPOCH, digits
from experiments import events

ANOTHER_RAY = Path(__file__).parents[1] / "another_ray"  # see there
LEFT_OUT = [
    "Workers that die are not replaced one by one, because of another version of Ray",
    "its workers may keep their CPUs, because of another version of Ray",
    "Nodes that are going to be taken away are left too late",
]

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return digits(tmp_path)


def finish(run_file: Path) -> Command:
    """The same command again, to the end."""
    with training(run_file) as command:
        assert command.wait() == 0, command.output
    return command


def stop_after_steps(run_file: Path, step: int, stop: Callable[[Command], None]) -> tuple[int, str]:
    """Start the command, stop it once it is there; its exit code and output."""
    with training(run_file) as command:
        command.wait_for_step(step)
        stop(command)
        return command.wait(), command.output


def assert_resumed_within_an_epoch(run_dir: Path, times: int) -> None:
    resumed = events(run_dir, "resumed")
    assert len(resumed) == times
    assert all(0 < event["step"] < STEPS_AN_EPOCH * EPOCHS for event in resumed)
    assert all(event["step"] % STEPS_AN_EPOCH for event in resumed)


@pytest.mark.parametrize(
    ("rank", "settings", "variables"),
    [(0, {"in_job_recovery": False}, {}), (1, {}, {"PYTHONPATH": str(ANOTHER_RAY)})],
    ids=["as configured", "another Ray"],
)
def test_run_with_a_killed_worker_ends_as_the_undisturbed_one(tmp_path, undisturbed, rank, settings, variables):
    with training(digits(tmp_path, **settings), variables=variables) as command:
        with command.held_at(KILL_AT_STEP):
            killed_at = time.time()
            kill(command.worker_pid(rank))
        assert command.wait() == 0, command.output
        output = command.output

    (failure,) = events(command.run_dir, "failure")
    assert f"rank {rank}: the worker process died" in failure["cause"]
    assert_resumed_within_an_epoch(command.run_dir, times=1)
    (resumed,) = events(command.run_dir, "resumed")
    assert killed_at <= failure["time"] == resumed["noticed_at"]
    assert_times_add_up(command.run_dir, killed_at, resumed, "waited_s", "state_s")
    assert_same_run(undisturbed, command.run_dir)
    assert "worker process died" in output
    assert "Traceback" not in output
    assert [line in output for line in LEFT_OUT] == [bool(variables)] * len(LEFT_OUT)


def test_second_driver_is_refused_and_the_same_command_right_after_a_kill_ends_as_the_undisturbed_one(
    tmp_path, undisturbed
):
    run_file = digits(tmp_path, hang_floor_s=None)
    with training(run_file) as command:
        command.wait_for_step(1)
        worker = command.worker_pid(1)
        os.kill(worker, signal.SIGSTOP)  # so that the run is there for as long as the second one takes
        with training(run_file) as second:
            assert second.wait() == 1, second.output
            assert f"digits is in use by process {command.pid} of" in second.output
            assert "--take-over" in second.output
        os.kill(worker, signal.SIGCONT)
        command.wait_for_step(KILL_AT_STEP)
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        finish(run_file)  # its workers may be there for a while, and train on until the run is claimed
        command.wait_until_nothing_is_left(but=OUTLIVING)

    assert len(events(command.run_dir, "resumed")) == 1
    assert_same_run(undisturbed, command.run_dir)


def test_run_whose_driver_and_workers_are_told_to_end_goes_on_from_its_last_step(run_file, undisturbed):
    run_dir = run_file.parent / "digits"
    code, output = stop_after_steps(run_file, KILL_AT_STEP, lambda command: command.send_to_group(signal.SIGTERM))
    terminated_at = step_of(newest_checkpoint(run_dir))
    assert code == 143, output
    assert "Traceback" not in output
    assert terminated_at == whole_lines(run_dir / "metrics.jsonl")[-1]["step"] >= KILL_AT_STEP

    step = terminated_at + 10
    code, output = stop_after_steps(run_file, step, lambda command: command.send_to_group(signal.SIGINT))
    interrupted_at = step_of(newest_checkpoint(run_dir))
    assert code == 130, output
    assert "Traceback" not in output
    assert interrupted_at == whole_lines(run_dir / "metrics.jsonl")[-1]["step"] >= step

    with training(run_file) as command:
        told_at = command.wait_for_step(interrupted_at + 10)
        os.kill(command.worker_pid(1), signal.SIGTERM)
        assert command.wait() == 0, command.output
    (preempted,) = events(run_dir, "preemption")
    preempted_at = [row["step"] for row in whole_lines(run_dir / "metrics.jsonl") if row["time"] < preempted["time"]][
        -1
    ]
    assert preempted_at >= told_at

    resumed = [event["step"] for event in events(run_dir, "resumed")]
    assert resumed == [terminated_at, interrupted_at, preempted_at]  # no step is repeated
    assert events(run_dir, "failure") == []
    assert_same_run(undisturbed, run_dir)


def test_loss_of_the_link_to_the_driver_does_not_touch_the_run(run_file, undisturbed):
    with training(run_file) as command:
        with command.held_at(KILL_AT_STEP):
            kill(command.actor_pid("Link"))
        assert command.wait() == 0, command.output

    assert events(command.run_dir, "failure") == []
    assert_same_run(undisturbed, command.run_dir)


def test_workers_go_on_from_memory_and_from_storage_once_memory_is_lost(tmp_path, undisturbed):
    with training(digits(tmp_path, save_every=40, snapshot_every_n_steps=5, in_job_recovery=False)) as command:
        with command.held_at(58):
            kill(command.worker_pid(1))
            killed_at = whole_lines(command.run_dir / "metrics.jsonl")[-1]["step"]
        with command.held_at(killed_at + 20):
            kill(command.actor_pid("Vault"))
            kill(command.worker_pid(0))
        assert command.wait() == 0, command.output

    from_memory, from_storage = events(command.run_dir, "resumed")
    assert from_memory["tier"] == "memory"
    assert 0 <= killed_at - from_memory["step"] <= 10  # five steps, and those while the snapshot was on its way
    assert from_storage["tier"] == "storage"
    assert from_storage["step"] % 40 == 0
    assert_same_run(undisturbed, command.run_dir)
