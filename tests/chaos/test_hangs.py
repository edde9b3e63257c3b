"""Ranks that hang are named and replaced, and the run ends as if nothing had happened."""

from pathlib import Path

import pytest
from cluster_runs import assert_same_run, newest_checkpoint, step_of, training, write_run_file
from experiments import events
from hanging_experiment import BOTH, REGEX, SKIP, SLEEP, STEPS, STOP, mark_all

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

EXPERIMENT = Path(__file__).parents[1] / "hanging_experiment.py"
STEPS_AN_EPOCH, EPOCHS = 20, 8


def run_file(directory: Path, marks: Path) -> Path:
    return write_run_file(
        directory / "hanging.yaml",
        experiment=f"{EXPERIMENT}:experiment",
        model={"marks": str(marks)},
        training={
            "epochs": EPOCHS,
            "batch_size": 8,
            "save_every_n_epochs": None,
            "save_every_n_steps": 15,
            "log_every_n_steps": 1,
        },
        cluster={"num_workers": 2, "name": "hanging", "storage_path": str(directory), "hang_floor_s": 6.0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    mark_all(directory)
    with training(run_file(directory, directory)) as command:
        assert command.wait() == 0, command.output
    assert events(command.run_dir, "hang") == []
    assert step_of(newest_checkpoint(command.run_dir)) == STEPS_AN_EPOCH * EPOCHS
    return command.run_dir


def test_ranks_that_sleep_hold_the_gil_are_stopped_or_skip_an_exchange_one_or_all_are_named_and_replaced(
    tmp_path, undisturbed
):
    with training(run_file(tmp_path, tmp_path)) as command:
        assert command.wait() == 0, command.output
        output = command.output

    hangs = sleep, regex, stop, skip, *both = events(command.run_dir, "hang")
    assert [hang["rank"] for hang in hangs[:4]] == [0, 1, 0, 1]
    assert [hang["phase"] for hang in hangs] == ["forward", "forward", "hook", "backward", "forward", "forward"]
    assert [hang["step"] for hang in hangs[:4]] == [STEPS[SLEEP], STEPS[REGEX], STEPS[STOP] - 1, STEPS[SKIP]]
    assert {(hang["rank"], hang["step"]) for hang in both} == {(0, STEPS[BOTH]), (1, STEPS[BOTH])}
    assert "in forward" in sleep["last_lines"][0]
    assert "in match" in regex["last_lines"][0]
    assert "in on_step_end" in stop["last_lines"][0]
    assert "stopped by a signal" in stop["reason"]
    assert "ahead of an exchange" in skip["reason"]
    for hang in hangs:
        assert "hanging_experiment.py" in (command.run_dir / hang["stack"]).read_text() or hang is skip
    resumed = events(command.run_dir, "resumed")
    assert len(resumed) == 5
    assert resumed[-1]["step"] == 135  # where the newest checkpoint is: nobody was left
    assert len(events(command.run_dir, "failure")) >= len(resumed)
    assert "rank 0 hung in forward for" in output
    assert "rank 1 hung in forward for" in output
    assert_same_run(undisturbed, command.run_dir)
