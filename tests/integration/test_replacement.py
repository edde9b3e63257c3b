"""What in-job recovery rests on is there in this Ray, and where it is not, all workers are started again."""

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig
from ray_trainer.cluster.rejoin import rejoins
from ray_trainer.cluster.replacement import InPlaceConfig, missing_interface


def test_this_ray_replaces_single_workers():
    assert missing_interface() is None
    assert InPlaceConfig().backend_cls.has_replica_groups


def test_ray_that_does_not_replace_single_workers_starts_all_again(monkeypatch, caplog):
    monkeypatch.delattr(WorkerGroup, "replace_replica_group")

    assert missing_interface() == "WorkerGroup has no replace_replica_group"
    assert not rejoins(ClusterConfig(num_workers=2), TrainingConfig())
    assert "another version of Ray" in caplog.text


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
