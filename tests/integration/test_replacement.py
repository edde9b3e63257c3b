"""What in-job recovery rests on is there in this Ray, and where it is not, all workers are started again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private.state import GlobalState
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import Worker

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig
from ray_trainer.cluster.groups import recorders
from ray_trainer.cluster.internals import ControllerCallback, missing_creators, missing_groups
from ray_trainer.cluster.rejoin import rejoins
from ray_trainer.cluster.replacement import InPlaceConfig, missing_interface

ANOTHER_RAY = Path(__file__).parents[1] / "another_ray"


def test_this_ray_replaces_single_workers():
    assert missing_creators() is None
    assert missing_groups() is None
    assert missing_interface() is None
    assert InPlaceConfig().backend_cls.has_replica_groups


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (WorkerGroup, "replace_replica_group"),
        (WorkerGroup, "get_worker_group_state"),
        (WorkerGroupCallback, "after_worker_group_start"),
        (ReplicaGroup, "is_active"),
    ],
)
def test_ray_that_does_not_replace_single_workers_starts_all_again(monkeypatch, caplog, owner, name):
    monkeypatch.delattr(owner, name)

    assert missing_interface() == f"{owner.__name__} has no {name}"
    assert not rejoins(ClusterConfig(num_workers=2), TrainingConfig())
    assert "another version of Ray" in caplog.text


@pytest.mark.parametrize(("owner", "name"), [(Worker, "actor"), (WorkerGroupState, "placement_group_handle")])
def test_ray_whose_workers_are_described_otherwise_starts_all_again(monkeypatch, owner, name):
    monkeypatch.setattr(owner, "__annotations__", {"other": int})

    assert missing_interface() == f"{owner.__name__} has no {name}"


def replace_otherwise(self: Any, index: int, reason: str) -> None:
    """As another Ray may call it, or do it."""


@pytest.mark.parametrize(
    ("owner", "name", "missing"),
    [
        (WorkerGroup, "replace_replica_group", "WorkerGroup.replace_replica_group can't be called with 1 arguments"),
        (WorkerGroup, "__init__", "WorkerGroup has no _execution_group_callbacks"),
        (TrainController, "_replace_bad_workers", "TrainController replaces workers in another way"),
    ],
)
def test_ray_that_replaces_workers_in_another_way_starts_all_again(monkeypatch, owner, name, missing):
    def replace(self: Any, index: int) -> None:
        """Without what it should do."""

    monkeypatch.setattr(owner, name, replace_otherwise if name == "replace_replica_group" else replace)

    assert missing_interface() == missing


@pytest.mark.parametrize(
    ("owner", "name"),
    [(GlobalState, "_connect_and_get_accessor"), (ControllerCallback, "after_controller_start")],
)
def test_run_goes_without_what_ray_has_of_it_where_ray_does_not_tell_it(monkeypatch, caplog, owner, name):
    monkeypatch.delattr(owner, name)

    assert recorders(link=None) == []
    assert "may keep their CPUs, because of another version of Ray" in caplog.text


def test_package_can_be_imported_with_a_ray_that_has_other_internal_modules():
    code = (
        "from ray_trainer.cluster import ClusterConfig, fit, sweep\n"
        "from ray_trainer import TrainingConfig\n"
        "from ray_trainer.cluster.rejoin import rejoins\n"
        "print(rejoins(ClusterConfig(num_workers=2), TrainingConfig()))"
    )
    paths = os.pathsep.join([str(ANOTHER_RAY), *sys.path])

    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )

    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
    assert "no module ray.train.v2._internal" in ran.stderr


@pytest.mark.parametrize(
    ("cluster", "training", "is_in_place"),
    [
        ({"num_workers": 2}, {}, True),
        ({"num_workers": 2, "in_job_recovery": False}, {}, False),
        ({"num_workers": 1}, {}, False),
        ({"num_workers": (1, 2)}, {}, False),
        ({"num_workers": 2, "use_gpu": True}, {}, False),
        ({"num_workers": 2}, {"parallelism": "fsdp"}, False),
    ],
)
def test_workers_are_replaced_one_by_one_where_a_survivor_has_all_there_is(cluster, training, is_in_place):
    assert rejoins(ClusterConfig(**cluster), TrainingConfig(**training)) is is_in_place
