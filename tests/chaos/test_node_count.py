"""Nodes come and go under runs whose workers are all started again: ``num_workers: [least, most]``, sharded models."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import handover
import mortal_experiment
import pytest
import ray
import slow_points
from cluster_runs import assert_same_run, descendants, kill, short_directory, whole_lines
from experiments import events
from mortal_experiment import experiment_of
from ray.cluster_utils import Cluster

from ray_trainer import Trainer, TrainingConfig
from ray_trainer.chaos import compare_runs
from ray_trainer.cluster import ClusterConfig, fit
from ray_trainer.cluster.resizing import look_at_cluster
from ray_trainer.seeding import set_random_seed
from ray_trainer.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

for module in (mortal_experiment, handover, slow_points):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it


class Nodes:
    """A head without room for workers, and nodes with a seat for one each."""

    def __init__(self, temp_dir: str) -> None:
        head = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False, "temp_dir": temp_dir}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
        for _ in range(2):
            self.add()

    def add(self) -> None:
        """One more, of which Ray is to know at once: it would look within 20 s."""
        self.cluster.add_node(num_cpus=1, resources={"seat": 1}, object_store_memory=100_000_000)
        look_at_cluster()

    def lose_that_of(self, pid: int) -> None:
        """SIGKILL to all processes of the node on which a worker is."""
        for node in self.cluster.worker_nodes:
            family = descendants(node.all_processes["raylet"][0].process.pid)
            if pid in family:
                for each in family:
                    kill(each)
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError(f"process {pid} is on no node")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with short_directory() as temp_dir:
        found = Nodes(temp_dir)
        yield found
        ray.shutdown()
        found.cluster.shutdown()


class Following:
    """A run under way in a thread."""

    def __init__(self, running: "Future[Any]", run_dir: Path) -> None:
        self._running = running
        self.run_dir = run_dir

    def until(self, look: Callable[[], Any]) -> Any:
        while not (found := look()):
            assert not self._running.done(), self._running.result()
            time.sleep(0.05)
        return found

    def wait_for(self, event: str, count: int) -> dict[str, Any]:
        def look() -> Any:
            rows = [row for row in whole_lines(self.run_dir / "events.jsonl") if row["event"] == event]
            return rows[count - 1] if len(rows) >= count else None

        return self.until(look)

    def newest_step(self) -> int:
        return max((row["step"] for row in whole_lines(self.run_dir / "metrics.jsonl")), default=0)

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: self.newest_step() >= step)

    def result(self) -> Any:
        return self._running.result()


ELASTIC = TrainingConfig(
    epochs=60,
    batch_size=5,
    determinism="elastic",
    log_every_n_steps=1,
    save_every_n_epochs=None,
    save_every_n_steps=250,
    validate_every_n_epochs=30,
    tensorboard=False,
)  # of nine steps an epoch


def trained_alone(directory: Path) -> Path:
    """The run of one process, without Ray."""
    set_random_seed(ELASTIC.random_seed)
    experiment, config = experiment_of(), SimpleNamespace(graves=str(directory))
    model, hooks = experiment.build_model(config), experiment.build_hooks()
    training = replace(ELASTIC, global_batch_size=2 * ELASTIC.batch_size, checkpoint_dir=str(directory))
    trainer = Trainer(model, config, training, experiment.task_spec, hooks)
    trainer.train(**{f"{name}_data": data for name, data in experiment.build_datasets(config, training).items()})
    return directory


def cluster_config(directory: Path, num_workers: int | tuple[int, int], name: str = "run") -> ClusterConfig:
    seat = {"CPU": 1, "seat": 1}
    return ClusterConfig(num_workers, name=name, storage_path=str(directory), resources_per_worker=seat)


def test_run_goes_on_with_fewer_workers_when_a_node_is_lost_and_with_more_when_one_joins(
    nodes: Nodes, tmp_path: Path
) -> None:
    graves, slow = tmp_path / "graves", tmp_path / "graves" / "slow"
    graves.mkdir()
    where, values = cluster_config(tmp_path, (1, 2)), {"graves": str(graves)}
    with ThreadPoolExecutor() as pool:
        run = Following(pool.submit(fit, experiment_of(), ELASTIC, where, values), tmp_path / "run")
        run.wait_for("checkpoint_saved", 1)
        slow.touch()
        nodes.lose_that_of(run.wait_for("workers_started", 1)["pids"][0])
        run.wait_for("resized", 1)
        run.wait_for_step(260)
        nodes.add()
        added_at = run.newest_step()
        run.wait_for("resized", 2)
        slow.unlink()
        run.result()

    assert [event["num_workers"] for event in events(run.run_dir, "workers_started")] == [2, 1, 2]
    assert [(event["from"], event["to"]) for event in events(run.run_dir, "resized")] == [(2, 1), (1, 2)]
    shrunk, grown = events(run.run_dir, "resumed")
    assert shrunk["step"] == 250
    assert grown["step"] >= added_at  # they saved before they were ended
    assert len(events(run.run_dir, "failure")) == 1
    assert_same_run(trained_alone(tmp_path / "alone"), run.run_dir)


def test_sharded_run_that_loses_a_worker_and_then_a_node_ends_as_the_undisturbed_one(
    nodes: Nodes, tmp_path: Path
) -> None:
    training = TrainingConfig(
        epochs=1, batch_size=4, log_every_n_steps=1, save_every_n_steps=20, tensorboard=False, parallelism="fsdp"
    )
    whole = fit(slow_points.experiment, training, cluster_config(tmp_path, 2, "whole"))
    where = cluster_config(tmp_path, 2)
    with ThreadPoolExecutor() as pool:
        run = Following(pool.submit(fit, slow_points.experiment, training, where), tmp_path / "run")
        run.wait_for_step(25)
        kill(run.wait_for("workers_started", 1)["pids"][0])
        started = run.wait_for("workers_started", 2)
        run.wait_for_step(started["step"] + 25)
        nodes.lose_that_of(started["pids"][1])
        nodes.add()
        run.result()

    first, _ = events(run.run_dir, "failure")
    assert "rank 0: the worker process died" in first["cause"]
    resumed = events(run.run_dir, "resumed")
    assert [event["tier"] for event in resumed] == ["storage", "storage"]
    assert 20 <= resumed[0]["step"] < resumed[1]["step"] < slow_points.STEPS
    found = compare_runs(Storage.open(whole.run_dir), Storage.open(run.run_dir))
    assert found.differences == ()
    assert found.num_tensors > 0
