"""A node is cut off from the others in the middle of a run, on a real network, and comes back."""

from pathlib import Path

import pytest
import slow_points
from cluster_runs import assert_same_run, command_line, descendants, kill, training, write_run_file
from experiments import events, everything_in
from network_nodes import RayOnNetwork, ray_on_network, why_not

from ray_trainer.checkpoint import list_checkpoints, verify

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]


def run_file(directory: Path, ray: RayOnNetwork, name: str) -> Path:
    chosen = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every_n_steps": 1, "save_every_n_steps": 20}
    where = {"name": name, "storage_path": str(directory), "address": ray.address}
    return write_run_file(
        directory / f"{name}.yaml",
        experiment=f"{slow_points.__file__}:experiment",
        training=chosen,
        cluster={"num_workers": 2, "placement_strategy": "SPREAD", "max_failures": 1, **where},
    )


def test_node_that_is_cut_off_costs_time_alone_and_writes_nothing_any_more(tmp_path):
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    with ray_on_network(tmp_path) as ray:
        driver = {"prefix": ray.hosts[0].prefix, "variables": ray.environment}
        with training(run_file(tmp_path, ray, "whole"), **driver) as command:
            assert command.wait() == 0, command.output
        with training(run_file(tmp_path, ray, "cut"), **driver) as command:
            command.wait_for_step(45)
            rank_0 = command.started_pids()[0]  # the one that commits
            (lost,) = [place for place, node in enumerate(ray.nodes) if rank_0 in descendants(node.process.pid)]
            beside_driver = descendants(ray.nodes[0].process.pid)
            (meeting,) = [pid for pid in beside_driver if command_line(pid).startswith("ray::Rendezvous")]
            kill(meeting)  # the one that Ray starts in its place knows nothing of who trains
            ray.hosts[lost].cut()
            assert command.wait() == 0, command.output

        run_dir = tmp_path / "cut"
        ended = everything_in(run_dir)
        assert rank_0 in descendants(ray.nodes[lost].process.pid), "it was to be alive, and cut off"
        ray.hosts[lost].mend()
        ray.nodes[lost].process.wait(120)  # Ray tells it that it was given up

    assert events(run_dir, "failure")
    assert_same_run(tmp_path / "whole", run_dir)
    assert everything_in(run_dir) == ended
    assert [problem for record in list_checkpoints(run_dir) for problem in verify(run_dir, record.name)] == []
