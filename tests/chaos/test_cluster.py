"""A head and two nodes, storage on an S3 server: a node is lost, then the head, and jobs end as if nothing had been."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from experiments import TIMES, assert_same
from job_clients import Client
from ray_nodes import RayCluster, ray_cluster

from ray_trainer.checkpoint import list_checkpoints, load_weights
from ray_trainer.metrics.events import read_events
from ray_trainer.metrics.jsonl import read_rows
from ray_trainer.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]

EPOCHS = 12
STEPS = EPOCHS * 45  # 1,437 images, 2 workers with 16 each


@pytest.fixture(scope="module")
def cluster(running_s3_server: Any) -> Iterator[RayCluster]:
    with ray_cluster(running_s3_server.environment) as running:
        running.add_node(num_cpus=3)
        running.add_node(num_cpus=3)
        yield running


@pytest.fixture(scope="module")
def runs(running_s3_server: Any) -> str:
    return f"s3://{running_s3_server.new_bucket()}/runs"


@pytest.fixture(scope="module")
def whole(cluster: RayCluster, runs: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The undisturbed run, with which the others are compared."""
    client = submit(cluster, runs, "whole", tmp_path_factory.mktemp("whole"))
    assert client.wait() == 0, client.output
    return f"{runs}/whole"


def submit(cluster: RayCluster, runs: str, name: str, directory: Path, *options: str) -> Client:
    """The digits example on two workers, each on a node of its own as long as there are two."""
    settings = {
        "cluster.name": name,
        "cluster.storage_path": runs,
        "cluster.placement_strategy": "SPREAD",
        "training.epochs": EPOCHS,
        "training.save_every_n_steps": 30,
        "training.log_every_n_steps": 1,
        "training.tensorboard": "false",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = ["ray_trainer", "submit", "examples/digits.yaml", "--python", sys.executable, *options, *overrides]
    return Client(cluster.head, directory / f"{name}.log", *command)


def saved(run: str, step: int) -> Callable[[], bool | None]:
    return lambda: any(record.step >= step for record in list_checkpoints(Storage.open(run))) or None


def events(run: str, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(Storage.open(run)) if event["event"] == name]


def metric_rows(run: str) -> list[dict[str, Any]]:
    rows = sorted(read_rows(Storage.open(run), "metrics.jsonl"), key=lambda row: (row["step"], row["split"]))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(whole: str, other: str) -> None:
    assert {list_checkpoints(Storage.open(run))[-1].step for run in (whole, other)} == {STEPS}
    assert_same(load_weights(whole, "newest"), load_weights(other, "newest"))
    assert_same(metric_rows(whole), metric_rows(other))


def test_job_that_loses_a_node_goes_on_where_it_was_once_there_is_another(cluster, runs, whole, s3_server, tmp_path):
    run = f"{runs}/node"
    one_a_node = ("cluster.resources_per_worker={CPU: 2}", "cluster.torch_threads_per_worker=1")
    client = submit(cluster, runs, "node", tmp_path, *one_a_node)
    client.until(saved(run, 60), "a checkpoint at step 60")

    cluster.nodes.pop().kill()
    client.until(lambda: events(run, "waiting_for_room") or None, "Ray to find no room")
    cluster.add_node(num_cpus=3)

    assert client.wait() == 0, client.output
    assert events(run, "failure")
    assert [event["attempt"] for event in events(run, "workers_started")] == [1, 2]
    (resumed,) = events(run, "resumed")
    assert resumed["tier"] == "survivor"
    assert 60 <= resumed["step"] < STEPS
    assert_same_run(whole, run)


def test_job_goes_on_or_is_continued_by_the_same_command_after_the_head_was_lost(
    cluster, runs, whole, s3_server, tmp_path
):
    run = f"{runs}/head"
    client = submit(cluster, runs, "head", tmp_path, "--driver-cpus", "1")
    client.until(saved(run, 60), "a checkpoint at step 60")

    cluster.lose_head()
    assert not saved(run, STEPS)(), "the run was over before the head was lost"
    cluster.start_head()
    assert {"whole", "head"} <= cluster.head.jobs()  # kept outside of the head that was lost

    if client.wait() != 0:  # actors that Ray had put on the head are gone with it
        client = submit(cluster, runs, "head", tmp_path, "--driver-cpus", "1")
        assert client.wait() == 0, client.output
    assert_same_run(whole, run)
