"""What a run keeps outside of its workers lies where the loss of a node takes the least with it."""

from collections.abc import Iterator

import numpy as np
import pytest
import ray
from cluster_runs import short_directory
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from ray_trainer.cluster.link import open_link
from ray_trainer.cluster.rejoin import open_rendezvous
from ray_trainer.cluster.vault import RayVault, open_keeper
from ray_trainer.storage.snapshots import SnapshotPart

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

KEY = (0, 7)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """A head without a CPU, where the driver is, and two nodes."""
    with short_directory() as temp_dir:
        head = {"num_cpus": 0, "temp_dir": temp_dir, "object_store_memory": 100_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        ray.init(address=cluster.address)
        yield [node["NodeID"] for node in ray.nodes()]
        ray.shutdown()
        cluster.shutdown()


def places() -> dict[str, set[str]]:
    """On which nodes the living actors of each class are."""
    found: dict[str, set[str]] = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")]):
        found.setdefault(actor.class_name.rpartition(".")[2], set()).add(actor.node_id)
    return found


def test_meeting_point_link_and_keeper_are_beside_the_driver(nodes):
    opened = [open_rendezvous(2, 0, may_shrink=False), open_link(), open_keeper()]
    ray.get([actor.__ray_ready__.remote() for actor in opened])

    driver = {ray.get_runtime_context().get_node_id()}
    assert places() == {"Rendezvous": driver, "Link": driver, "Keeper": driver}


def test_snapshots_are_on_another_node_than_the_worker_that_opens_their_vault(nodes):
    keeper = open_keeper()

    @ray.remote(num_cpus=1)
    def work() -> str:
        part = SnapshotPart(key=KEY, rank=0, num_parts=1, manifest=b"", files=())
        RayVault(keeper, 1).put(part, np.arange(5, dtype=np.uint8))
        return ray.get_runtime_context().get_node_id()

    worker = ray.get(work.remote())
    (vault,) = places()["Vault"]
    assert vault in nodes
    assert vault != worker
