"""A run on the cluster whose storage is an object store that fails."""

from collections.abc import Iterator

import faulty_experiment
import pytest
import ray
from cluster_runs import ray_of_two_cpus
from ray import cloudpickle

from ray_trainer import TrainingConfig
from ray_trainer.checkpoint import list_checkpoints, load_weights, verify
from ray_trainer.cluster import ClusterConfig, SweepConfig, fit, sweep
from ray_trainer.cluster.storage import SNAPSHOT
from ray_trainer.errors import ConfigError
from ray_trainer.metrics.events import read_events
from ray_trainer.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TRAINING = {"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "save_every_n_steps": 5, "tensorboard": False}
STEPS = 20


@pytest.fixture
def ray_that_knows_s3(s3_server) -> Iterator[None]:
    cloudpickle.register_pickle_by_value(faulty_experiment)
    with ray_of_two_cpus():  # after the variables are set, which its workers inherit
        yield


def train(storage_path: str, training: TrainingConfig) -> Storage:
    cluster = ClusterConfig(num_workers=2, name="run", storage_path=storage_path, max_failures=0)
    return Storage.open(fit(faulty_experiment.experiment, training, cluster, {"fault": None}).run_dir)


def test_run_whose_object_store_refuses_rays_own_list_and_fails_for_a_while_ends_as_on_a_disk(
    s3_server, ray_that_knows_s3, tmp_path
):
    bucket = s3_server.new_bucket()
    failing = {"left": 30}

    def fault(method: str, path: str) -> bool:
        """Refuse Ray's list for ever, and everything for 30 requests from the second checkpoint on."""
        if method in ("PUT", "POST") and path.endswith(SNAPSHOT):
            return True
        if "step00000010" in path or failing["left"] < 30:
            failing["left"] -= 1
        return 0 <= failing["left"] < 30

    with s3_server.refusing(fault):
        run = train(f"s3://{bucket}/runs", TrainingConfig(**TRAINING))
    on_disk = train(str(tmp_path), TrainingConfig(**TRAINING))

    assert any(path.endswith(SNAPSHOT) for _, path in s3_server.refused)
    assert failing["left"] < 0
    assert [event for event in read_events(run) if event["event"] == "failure"] == []
    assert list_checkpoints(run)[-1].step == STEPS
    assert [problem for record in list_checkpoints(run) for problem in verify(run, record.name)] == []
    weights, expected = (load_weights(place.uri, "newest") for place in (run, on_disk))
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert ray.is_initialized()


def search(storage_path: str, training: TrainingConfig) -> None:
    space = {"training.learning_rate": {"grid": [0.1, 0.01]}}
    cluster = ClusterConfig(name="run", storage_path=storage_path)
    sweep(faulty_experiment.experiment, training, cluster, SweepConfig(space=space, metric="val_loss"), {"fault": None})


@pytest.mark.parametrize("start", [train, search])
def test_missing_bucket_is_refused_before_anything_is_started(s3_server, start):
    with pytest.raises(ConfigError, match=r"cluster\.storage_path: s3://no-such-bucket/runs/run .*Create it"):
        start("s3://no-such-bucket/runs", TrainingConfig(**TRAINING))

    assert not ray.is_initialized()


def test_unknown_access_key_is_refused_before_anything_is_started(s3_server, monkeypatch):
    bucket = s3_server.new_bucket()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")

    with pytest.raises(ConfigError, match=r"cluster\.storage_path: s3://.*not known; check AWS_ACCESS_KEY_ID"):
        train(f"s3://{bucket}/runs", TrainingConfig(**TRAINING))

    assert not ray.is_initialized()
    assert "Contents" not in s3_server.client().list_objects_v2(Bucket=bucket)
