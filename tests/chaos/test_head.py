"""Ray's controller, Ray's head or a node goes away while a run is on it; the run ends as if nothing had happened."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
import slow_points
from cluster_runs import (
    assert_same_run,
    command_line,
    descendants,
    kill,
    newest_checkpoint,
    short_directory,
    step_of,
    training,
    whole_lines,
    write_run_file,
)
from experiments import events
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

ray.cloudpickle.register_pickle_by_value(slow_points)  # workers cannot import it

TRAINING = {"batch_size": 4, "learning_rate": 1e-2, "log_every_n_steps": 1, "save_every_n_steps": 20}
GRACE_S = 15
NOTICE_S = 20


def run_file(directory: Path, **changes: Any) -> Path:
    cluster = {"num_workers": 2, "name": "points", "storage_path": str(directory), "max_failures": 1}
    return write_run_file(
        directory / "run.yaml",
        experiment=f"{slow_points.__file__}:experiment",
        training={"epochs": 1, **TRAINING, **changes},
        cluster=cluster,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with training(run_file(tmp_path_factory.mktemp("undisturbed"))) as command:
        assert command.wait() == 0, command.output
    return command.run_dir


def test_lost_head_leaves_a_checkpoint_of_that_time_and_the_command_given_again_goes_on(
    tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", str(GRACE_S))
    monkeypatch.setenv("SLOW_POINTS_PAUSE_S", "0.15")  # so that the run is not over when the head is missed
    with training(run_file(tmp_path, save_every_n_steps=None)) as command:
        killed_at = command.wait_for_step(45)
        (head,) = [pid for pid in descendants(command.pid) if "gcs_server" in command_line(pid).split("\0")[0]]
        kill(head)
        assert command.wait() != 0
        command.wait_until_nothing_is_left()

    assert len(events(command.run_dir, "head_lost")) == 1
    assert killed_at < step_of(newest_checkpoint(command.run_dir)) < slow_points.STEPS  # nothing else asks for one
    monkeypatch.delenv("SLOW_POINTS_PAUSE_S")
    with training(tmp_path / "run.yaml") as command:
        assert command.wait() == 0, command.output
    assert_same_run(undisturbed, command.run_dir)


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Cluster]:
    """A head, and two nodes each of which has room for both workers."""
    monkeypatch.setenv("SLOW_POINTS_PAUSE_S", "0.08")  # so that the run is not over before the second notice is
    with short_directory() as temp_dir:
        head = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False, "temp_dir": temp_dir}
        cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=2, resources={"seat": 2}, object_store_memory=100_000_000)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_nodes_that_are_drained_are_left_after_a_save_and_no_step_is_repeated(cluster, tmp_path, undisturbed):
    """The first at once, because there is room on the second; that one in the end, because there is none."""

    run_dir = tmp_path / "points"
    where = ClusterConfig(
        2, name="points", storage_path=str(tmp_path), resources_per_worker={"CPU": 1, "seat": 1}, max_failures=0
    )
    thread = Thread(target=fit, args=(slow_points.experiment, TrainingConfig(epochs=1, **TRAINING), where))
    thread.start()

    def wait_for(rows: Callable[[], list[Any]]) -> list[Any]:
        while not (found := rows()):
            assert thread.is_alive()
            time.sleep(0.02)
        return found

    wait_for(lambda: [row for row in whole_lines(run_dir / "metrics.jsonl") if row["step"] >= 25])
    first = node_of_workers(cluster)
    assert drain(cluster, first, notice_s=120)
    wait_for(lambda: told(run_dir, "resumed"))
    second = node_of_workers(cluster)
    assert second is not first
    cluster.remove_node(first)
    assert drain(cluster, second, notice_s=NOTICE_S)
    given_at = time.time()
    wait_for(lambda: told(run_dir, "preemption")[1:])
    left_at = time.time()
    cluster.remove_node(second)
    cluster.add_node(num_cpus=2, resources={"seat": 2}, object_store_memory=100_000_000)
    thread.join(120)

    assert not thread.is_alive()
    (notice,) = events(run_dir, "preemption_notice")
    assert given_at < notice["time"] < given_at + NOTICE_S
    saves = [save["step"] for save in events(run_dir, "checkpoint_saved") if given_at < save["time"] < left_at]
    preempted = [event["time"] for event in events(run_dir, "preemption")]
    done = [[row["step"] for row in whole_lines(run_dir / "metrics.jsonl") if row["time"] < left] for left in preempted]
    assert [event["step"] for event in events(run_dir, "resumed")] == [steps[-1] for steps in done]  # none is repeated
    assert len(set(saves)) >= 2
    assert saves[-1] == done[1][-1] > saves[0] > done[0][-1]
    assert events(run_dir, "failure") == []
    assert_same_run(undisturbed, run_dir)


def node_of_workers(cluster: Cluster) -> Any:
    (node,) = [
        node
        for node in cluster.worker_nodes
        for pid in descendants(node.all_processes["raylet"][0].process.pid)
        if command_line(pid).startswith("ray::RayTrainWorker")
    ][:1]
    return node


def told(run_dir: Path, event: str) -> list[Any]:
    return [row for row in whole_lines(run_dir / "events.jsonl") if row["event"] == event]


def drain(cluster: Cluster, node: Any, notice_s: int) -> bool:
    """Announce that the node is going to be taken away."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "spot", int((time.time() + notice_s) * 1000)
    )
    return bool(accepted)
