"""What a user did wrong is said in a sentence, by `fit` and at the command line, and nothing is left behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_experiment
import pytest
import ray
from cluster_runs import checkpoints_of, ray_of_two_cpus, training, whole_lines, write_run_file
from experiments import checkpoints, events, everything_in, run

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit
from ray_trainer.cluster.storage import SNAPSHOT
from ray_trainer.errors import ConfigError, DataError, RepeatedFailureError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ray.cloudpickle.register_pickle_by_value(faulty_experiment)  # workers cannot import it

TRAINING: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "shuffle": False,  # so that a sample's place says when it is used
    "save_every_n_steps": 1,
    "log_every_n_steps": 1,
}
BEFORE_THE_FIRST_STEP = {
    "no samples": (DataError, ["0 samples"]),
    "no rows": (DataError, ["no rows"]),
    "first label": (DataError, ["Label 7", "'labels'", "3 classes"]),
    "late label in Ray Data": (DataError, ["Label 7", "'labels'", "3 classes"]),
    "label of validation": (DataError, ["Label -3", "'labels'", "3 classes"]),
    "wide features": (DataError, ["does not fit the model", "'features' float32 (4, 6)"]),
    "build_model": (ConfigError, ["build_model", "KeyError", "depth", "faulty_experiment.py"]),
    "build_datasets": (ConfigError, ["build_datasets", "no points at /data/points.csv", "faulty_experiment.py"]),
    "no train": (ConfigError, ["build_datasets", "'training'", "'train'"]),
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """For `fit`; the command starts a Ray of its own."""
    with ray_of_two_cpus():
        yield


def fit_with(fault: str, storage_path: Path, training: dict[str, Any] | None = None, **cluster: Any) -> None:
    settings: dict[str, Any] = {"num_workers": 2, "name": "faulty", "storage_path": str(storage_path)}
    fit(
        faulty_experiment.experiment,
        TrainingConfig(**TRAINING | (training or {})),
        ClusterConfig(**(settings | cluster)),
        {"fault": fault},
    )


def command_with(fault: str, directory: Path, **cluster: Any) -> tuple[int, str]:
    """Exit code and output of the command line."""
    settings = {"num_workers": 2, "name": "faulty", "storage_path": str(directory / "runs")}
    run_file = write_run_file(
        directory / "faulty.yaml",
        experiment=f"{faulty_experiment.__file__}:experiment",
        model={"fault": fault},
        training=TRAINING,
        cluster=settings | cluster,
    )
    with training(run_file) as command:
        return command.wait(), command.output


@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_STEP)
def test_fit_refuses_what_cannot_be_trained_and_leaves_nothing(fault, tmp_path):
    kind, words = BEFORE_THE_FIRST_STEP[fault]

    with pytest.raises(kind) as caught:
        fit_with(fault, tmp_path)

    assert [word for word in words if word not in str(caught.value)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["build_model", "build_datasets"])
def test_command_refuses_what_cannot_be_trained_and_leaves_nothing(fault, tmp_path):
    _, words = BEFORE_THE_FIRST_STEP[fault]

    code, output = command_with(fault, tmp_path)

    assert code == 2, output
    assert [word for word in words if word not in output] == []
    assert "Traceback" not in output
    assert not (tmp_path / "runs" / "faulty").exists()


def test_fit_refuses_a_plan_that_the_machine_can_never_meet(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.num_workers: the run needs 64 workers"):
        fit_with("none", tmp_path, num_workers=64)

    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_plan_that_the_machine_can_never_meet(tmp_path):
    code, output = command_with("none", tmp_path, num_workers=4096)

    assert code == 2, output
    assert "cluster.num_workers: the run needs 4096 workers" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_fit_ends_at_a_wrong_label_late_in_the_data_without_trying_again(tmp_path):
    with pytest.raises(DataError, match="Label 7 in 'labels' is out of range"):
        fit_with("late label", tmp_path)

    run_dir = tmp_path / "faulty"
    assert [row["step"] for row in whole_lines(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(events(run_dir, "workers_started")) == 1
    assert checkpoints_of(run_dir) == [1, 2, 3, 4]


def test_command_ends_at_a_wrong_label_late_in_the_data_with_its_cause(tmp_path):
    code, output = command_with("late label", tmp_path)

    assert code == 2, output
    assert "Label 7 in 'labels' is out of range" in output
    assert "Traceback" not in output


def test_command_ends_when_the_same_error_comes_twice_at_the_same_place_with_the_users_traceback_first(tmp_path):
    code, output = command_with("stuck valve", tmp_path, max_failures=100)

    run_dir = tmp_path / "runs" / "faulty"
    told = output[output.index("ray-trainer: ") :]
    assert code == 1, output
    assert told.index("Traceback") < told.index("faulty_experiment.py") < told.index("the valve is stuck")
    assert told.index("the valve is stuck") < told.index("twice at the same place, after step 2")
    assert str(run_dir) in told
    assert len(events(run_dir, "failure")) == 2
    assert len(events(run_dir, "workers_started")) == 2
    assert checkpoints_of(run_dir) == [1, 2]


def test_fit_explains_memory_that_does_not_suffice_twice_and_goes_on_with_fewer_samples_at_once(tmp_path):
    with pytest.raises(RepeatedFailureError) as caught:
        fit_with("hunger", tmp_path, max_failures=100)

    run_dir = tmp_path / "faulty"
    told = str(caught.value)
    assert told.startswith("Out of memory in step 3, with 4 samples at once")
    assert told.index("on_out_of_memory to 'halve'") < told.index("twice at the same place, after step 2")
    assert len(events(run_dir, "failure")) == 2
    assert checkpoints_of(run_dir) == [1, 2]

    fit_with("hunger", tmp_path, {"on_out_of_memory": "halve"}, max_failures=100)

    (halved,) = events(run_dir, "out_of_memory")
    assert (halved["step"], halved["rank"], halved["samples_at_once"]) == (3, 1, 2)
    assert len(events(run_dir, "failure")) == 3
    assert checkpoints_of(run_dir) == [1, 2, 3, 4, 5]


def test_command_ends_when_workers_die_again_and_again_without_progress(tmp_path):
    code, output = command_with("crash", tmp_path, max_failures=1)

    told = [line for line in output.splitlines() if line.startswith("ray-trainer: ")]
    assert code == 1, output
    assert len(told) == 1
    assert "again and again without getting any further" in told[0]
    assert "the worker process died" in told[0]
    assert "cluster.max_failures" in told[0]
    assert "Traceback" not in output
    assert len(events(tmp_path / "runs" / "faulty", "failure")) == 2


def test_command_refuses_a_run_that_lost_all_it_saved_once_and_touches_nothing(tmp_path):
    run_dir = tmp_path / "runs" / "faulty"
    run(run_dir, epochs=1)
    newest = checkpoints(run_dir)[-1]
    (run_dir / newest / "manifest.json").unlink()
    (run_dir / SNAPSHOT).write_text("torn")
    files = [run_dir / path for path in everything_in(run_dir) if (run_dir / path).is_file()]
    before = {path: path.read_bytes() for path in files}

    code, output = command_with("none", tmp_path)

    told = [line for line in output.splitlines() if line.startswith("ray-trainer: ")]
    assert code == 1, output
    assert len(told) == 1, output
    assert "None of the checkpoints that were saved" in told[0]
    assert f"{newest}: manifest.json is missing, although the save was finished" in output
    assert "give the run another name" in output
    assert "Traceback" not in output
    assert {path: path.read_bytes() for path in files if path.exists()} | before == before
    assert [path.name for path in files if not path.exists()] == [SNAPSHOT]
    assert (run_dir / f"{SNAPSHOT}.broken").read_text() == "torn"
