"""A worker that is killed is replaced alone: the others stay, no step is lost or done twice, whatever comes next."""

from pathlib import Path

import pytest
from cluster_runs import Command, assert_same_run, kill, training, whole_lines
from digits_run import KILL_AT_STEP, digits
from experiments import events

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]


def newest_row(command: Command) -> int:
    return int(whole_lines(command.run_dir / "metrics.jsonl")[-1]["step"])


def wait_for_attempt(command: Command, attempt: int) -> None:
    """Until a run goes on after its failures."""

    def has_resumed() -> bool | None:
        seen = [row["attempt"] for row in whole_lines(command.run_dir / "events.jsonl") if row["event"] == "resumed"]
        return attempt in seen or None

    command.until(has_resumed, f"attempt {attempt}")


def test_each_rank_killed_in_turn_and_then_all_ends_as_the_undisturbed_run(tmp_path: Path, undisturbed: Path) -> None:
    with training(digits(tmp_path, max_failures=9)) as command:
        command.wait_for_step(KILL_AT_STEP)
        kill(command.worker_pid(1))
        first_killed_at = newest_row(command)
        wait_for_attempt(command, 2)
        survivor = command.worker_pid(0)
        command.wait_for_step(first_killed_at + 20)
        kill(survivor)
        second_killed_at = newest_row(command)
        wait_for_attempt(command, 3)
        command.wait_for_step(second_killed_at + 20)
        for pid in [command.worker_pid(0), command.worker_pid(1)]:
            kill(pid)
        assert command.wait() == 0, command.output
        assert "Traceback" not in command.output

    first, second, third = events(command.run_dir, "resumed")
    assert [event["tier"] for event in (first, second, third)] == ["survivor", "survivor", "storage"]
    assert first["step"] - first_killed_at in (0, 1)
    assert second["step"] - second_killed_at in (0, 1)
    assert [event["replaced"] for event in events(command.run_dir, "rejoined")] == [[1], [0]]
    assert_same_run(undisturbed, command.run_dir)
