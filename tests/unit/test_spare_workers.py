"""`ClusterConfig.spare_workers`: what they need, and where nothing would use them."""

import pytest

from ray_trainer.cli.runfile import RunFile
from ray_trainer.cluster import ClusterConfig
from ray_trainer.cluster.session import missing_resources, resource_plan, room_for_runs
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"num_workers": (1, 2)}, "give one number"),
        ({"num_workers": 1}, "set num_workers to 2 or more"),
        ({"num_workers": 2, "use_gpu": True}, "all workers start again"),
        ({"num_workers": 2, "in_job_recovery": False}, "switch it on"),
    ],
)
def test_spares_that_nothing_would_use_are_refused(cluster, told):
    with pytest.raises(ConfigError, match=f"spare_workers = 1: .*{told}"):
        ClusterConfig(spare_workers=1, **cluster).validate()


def test_spares_are_refused_with_shards_of_the_model():
    run_file = RunFile(
        experiment="digits.py:experiment",
        training=TrainingConfig(parallelism="fsdp"),
        cluster=ClusterConfig(num_workers=2, spare_workers=1),
    )

    with pytest.raises(ConfigError, match=r"cluster\.spare_workers = 1: .*fsdp"):
        run_file.validate()


def test_spares_are_part_of_what_a_run_needs():
    cluster = ClusterConfig(num_workers=2, spare_workers=1)

    assert resource_plan(cluster) == "2 workers and 1 spare, each with 1 CPU"
    assert missing_resources(cluster, [{"CPU": 3.0}]) is None
    missing = missing_resources(cluster, [{"CPU": 2.0}])
    assert missing is not None
    assert "Set cluster.spare_workers=0" in missing
    assert room_for_runs(cluster, [{"CPU": 8.0}]) == 2
