"""Questions to the nodes of a cluster, for `ray-trainer doctor`: what is there, what time it is, what they see."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.nodes import NodeFacts
from ray_trainer.cluster.readiness import require_cluster
from ray_trainer.cluster.session import missing_resources, ray_session

ANSWER_TIMEOUT_S = 60.0
PACKAGES = ("ray", "ray-trainer", "torch", "numpy", "pyarrow", "safetensors")


@dataclass(frozen=True)
class ClusterFacts:
    """What a cluster told.

    Attributes:
        nodes: those alive.
        missing: why the run does not fit, in words; None if it does.
    """

    nodes: list[NodeFacts]
    missing: str | None


@dataclass(frozen=True)
class StorageProbe:
    """A file that all nodes must see, and beside which each writes one of its own.

    Attributes:
        directory: URI or path.
        name: of the file.
        text: what is in it.
    """

    directory: str
    name: str
    text: str


def examine_cluster(cluster: ClusterConfig, probe: StorageProbe | None) -> ClusterFacts:
    """Ask every node of the cluster at ``cluster.address``.

    Args:
        cluster: what the run needs, and where.
        probe: written by the caller before; each node then has written ``NAME.K``, K its place in the list.

    Raises:
        ConfigError: the cluster cannot be joined.
    """
    require_cluster(cluster)
    logging.getLogger("ray").setLevel(logging.ERROR)
    with ray_session(cluster):
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = [_actor(node["NodeID"]) for node in alive]
        nodes = [_ask(node, actor, probe, place) for place, (node, actor) in enumerate(zip(alive, asked, strict=True))]
        return ClusterFacts(nodes, missing_resources(cluster, [node["Resources"] for node in alive]))


def _actor(node_id: str) -> ActorHandle:
    class Doctor:  # in here it travels by value: a node without this package can still say so
        def now(self) -> float:
            import time

            return time.time()

        def look(self, packages: tuple[str, ...]) -> tuple[dict[str, str | None], int, int]:
            import os
            from importlib import metadata

            versions: dict[str, str | None] = {}
            for package in packages:
                try:
                    versions[package] = metadata.version(package)
                except metadata.PackageNotFoundError:
                    versions[package] = None
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            try:
                shared = os.statvfs("/dev/shm")
            except OSError:
                return versions, memory, 0
            return versions, memory, shared.f_frsize * shared.f_blocks

        def try_storage(self, directory: str, name: str, text: str, own: str) -> str:
            try:
                from ray_trainer.storage import Storage

                place = Storage.open(directory).impatient()
                if place.read(name).decode() != text:
                    return f"{name} reads differently there"
                place.write(own, text.encode())
            except (OSError, ImportError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(Doctor).remote()


def _ask(node: dict[str, Any], actor: ActorHandle, probe: StorageProbe | None, place: int) -> NodeFacts:
    host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    try:
        ray.get(actor.now.remote(), timeout=ANSWER_TIMEOUT_S)  # its process has started with this
        before = time.time()
        there = float(ray.get(actor.now.remote(), timeout=ANSWER_TIMEOUT_S))
        after = time.time()
        versions, memory, shared = ray.get(actor.look.remote(PACKAGES), timeout=ANSWER_TIMEOUT_S)
        problem = ""
        if probe is not None:
            trial = actor.try_storage.remote(probe.directory, probe.name, probe.text, f"{probe.name}.{place}")
            problem = str(ray.get(trial, timeout=ANSWER_TIMEOUT_S))
    except ray.exceptions.RayError as error:
        return NodeFacts(host, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return NodeFacts(
        host=host,
        clock_offset_s=there - (before + after) / 2,
        clock_error_s=(after - before) / 2,
        versions=versions,
        memory_bytes=memory,
        shared_memory_bytes=shared,
        storage_problem=problem,
    )
