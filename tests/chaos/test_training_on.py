"""With ``determinism: elastic`` the survivors train on until the dead are replaced, and the bits are the same."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import handover
import mortal_experiment
import pytest
import ray
from cluster_runs import assert_same_run, kill, ray_of_two_cpus, stopped_controllers, whole_lines
from experiments import events
from mortal_experiment import experiment_of

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

for module in (mortal_experiment, handover):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it

EPOCHS = 30  # of six steps


def fit_elastic(directory: Path) -> Path:
    """The directory of a run of three workers."""
    graves = directory / "graves"
    graves.mkdir(parents=True, exist_ok=True)
    training = TrainingConfig(
        epochs=EPOCHS,
        batch_size=5,
        determinism="elastic",
        log_every_n_steps=1,
        save_every_n_steps=20,
        validate_every_n_epochs=10,
        tensorboard=False,
    )
    cluster = ClusterConfig(
        num_workers=3, name="elastic", storage_path=str(directory), resources_per_worker={"CPU": 0.5}
    )
    return Path(fit(experiment_of(), training, cluster, {"graves": str(graves)}).run_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run in which nobody dies; its Ray is there for the others."""
    with ray_of_two_cpus():
        yield fit_elastic(tmp_path_factory.mktemp("whole"))


def test_survivors_train_on_are_joined_and_end_the_run_without_another_one(tmp_path: Path, whole: Path) -> None:
    slow = tmp_path / "graves" / "slow"
    slow.parent.mkdir()
    slow.touch()
    run_dir = tmp_path / "elastic"

    def wait_for(event: str, count: int) -> dict[str, Any]:
        while True:
            rows = [row for row in whole_lines(run_dir / "events.jsonl") if row["event"] == event]
            if len(rows) >= count:
                return rows[count - 1]
            assert not running.done(), running.result()
            time.sleep(0.05)

    def newest_step() -> int:
        rows = [row["step"] for row in whole_lines(run_dir / "metrics.jsonl") if row["split"] == "train"]
        return rows[-1] if rows else 0

    def wait_for_step(step: int) -> None:
        while newest_step() < step:
            assert not running.done(), running.result()
            time.sleep(0.05)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(fit_elastic, tmp_path)
        wait_for_step(3)
        kill(wait_for("workers_started", 1)["pids"][0])
        first_killed_at = newest_step()
        grown_at = wait_for("resized", 2)["step"]
        with stopped_controllers():  # nobody is replaced any more
            wait_for_step(grown_at + 1)
            kill(wait_for("workers_started", 3)["pids"][1])
            second_killed_at = newest_step()
            slow.unlink()
            struck = running.result()

    shrunk, grown, last = events(struck, "resized")
    assert [(event["from"], event["to"]) for event in (shrunk, grown, last)] == [(3, 2), (2, 3), (3, 2)]
    assert shrunk["step"] - first_killed_at in (0, 1)
    assert grown["step"] > shrunk["step"] + 1  # steps were done by two
    assert last["step"] - second_killed_at in (0, 1)
    assert [event["replaced"] for event in events(struck, "rejoined")] == [[], [2], []]
    assert {event["tier"] for event in events(struck, "resumed")} == {"survivor"}
    assert_same_run(whole, struck)
