"""A cluster that does not answer is refused within seconds, before anything is written."""

import socket
from collections.abc import Iterator

import faulty_experiment
import pytest

from ray_trainer import TrainingConfig
from ray_trainer.cluster import ClusterConfig, SweepConfig, fit, sweep
from ray_trainer.cluster.readiness import require_cluster
from ray_trainer.errors import ConfigError


@pytest.fixture
def deaf_address() -> Iterator[str]:
    """A port that is taken, at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def train(cluster: ClusterConfig) -> None:
    fit(faulty_experiment.experiment, TrainingConfig(), cluster, {"fault": None})


def search(cluster: ClusterConfig) -> None:
    settings = SweepConfig(space={"training.learning_rate": {"grid": [0.1, 0.01]}}, metric="val_loss")
    sweep(faulty_experiment.experiment, TrainingConfig(), cluster, settings, {"fault": None})


@pytest.mark.parametrize("start", [train, search])
def test_address_where_nobody_listens_is_refused_and_nothing_is_written(start, deaf_address, tmp_path):
    with pytest.raises(ConfigError, match=rf"cluster\.address = '{deaf_address}': nobody answers there"):
        start(ClusterConfig(address=deaf_address, name="run", storage_path=str(tmp_path / "runs")))

    assert list(tmp_path.iterdir()) == []


def test_address_of_the_environment_is_named_where_auto_means_it(deaf_address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", deaf_address)

    with pytest.raises(ConfigError, match=rf"'auto' \(RAY_ADDRESS = '{deaf_address}'\): nobody answers"):
        require_cluster(ClusterConfig(address="auto"))


def test_address_where_somebody_listens_is_tried():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        require_cluster(ClusterConfig(address=f"127.0.0.1:{listener.getsockname()[1]}"))


def test_host_whose_name_is_unknown_is_refused():
    with pytest.raises(ConfigError, match=r"cluster\.address = 'no-such-host\.invalid:6379'"):
        require_cluster(ClusterConfig(address="no-such-host.invalid:6379"))
