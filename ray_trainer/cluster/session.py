"""Ray for the time of a run: joined where an address says so, else started for this run alone."""

import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.own_groups import own_process_groups
from ray_trainer.errors import ConfigError

logger = logging.getLogger(__name__)

#: What Ray Train reads from the environment of the driver; a user's own setting wins.
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a failure is seen, and a report taken, after this time
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows each line that a worker prints twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the directory that relative paths of the user mean
}
#: Where the number of workers follows the cluster, Ray decides for as many as it sees room for, so that they start at
#: once. If they do not, it goes by what was there a while ago (60 s by itself).
RANGE_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody gives this machine notice
    # a cleaner of Ray Train's asks a dashboard each second; without one it complains, or asks that of another Ray
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
    "RAY_LOGGER_LEVEL": "error",
    "RAY_task_events_report_interval_ms": "0",  # the head remembers each call of an actor, for a dashboard to show
}


@contextmanager
def ray_session(cluster: ClusterConfig, shows_output: bool = True) -> Iterator[None]:
    """Have Ray running inside; what was started here is stopped at the end, what was there stays.

    Args:
        cluster: says which Ray.
        shows_output: what workers print comes out here as well, if Ray is started or joined here.

    Raises:
        ConfigError: there is no cluster at the address, or it does not let this process in.
    """
    settings = TRAIN_SETTINGS | (LOCAL_SETTINGS if cluster.address is None else {})
    settings |= RANGE_SETTINGS if isinstance(cluster.num_workers, tuple) else {}
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    started = not ray.is_initialized()
    data_logger = logging.getLogger("ray.data")
    level_before = data_logger.level
    try:
        if started:
            _start(cluster, shows_output)
        ray.data.DataContext.get_current().enable_progress_bars = False
        data_logger.setLevel(logging.ERROR)  # it tells its plan and each start
        yield
    finally:
        data_logger.setLevel(level_before)
        if started:
            ray.shutdown()
        for name in added:
            del os.environ[name]


def _start(cluster: ClusterConfig, shows_output: bool) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": shows_output}
    if cluster.address is None:
        with own_process_groups():
            # never the Ray that happens to be found on this machine: it may be anybody's
            ray.init(address="local", include_dashboard=False, **options)
        return
    try:
        ray.init(address=cluster.address, runtime_env=_known_to_all(), **options)
    except (ray.exceptions.AuthenticationError, ConnectionError, ValueError) as error:
        raise ConfigError(
            f"cluster.address = {cluster.address!r}: the cluster there cannot be joined ({error}). Start one with 'ray "
            "start --head', give its host:port, or leave cluster.address out to train on this machine. If it asks "
            "for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what the head "
            "node keeps in ~/.ray/auth_token."
        ) from error


def _known_to_all() -> dict[str, Any]:
    """The cluster's address for every process of a job: Ray Train's clean-up looks for it where several Rays run."""
    address = os.environ.get("RAY_ADDRESS", "")  # set by Ray itself for the driver of a job
    return {"env_vars": {"RAY_ADDRESS": address}} if re.fullmatch(r"[^/]+:\d+", address) else {}


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker occupies, in Ray's terms."""
    resources = {"CPU": 1.0, **(cluster.resources_per_worker or {})}
    if cluster.use_gpu:
        resources.setdefault("GPU", 1.0)
    return resources


def torch_threads(cluster: ClusterConfig) -> int:
    """How many threads each worker computes with."""
    return cluster.torch_threads_per_worker or max(1, int(resources_per_worker(cluster)["CPU"]))


def worker_bounds(cluster: ClusterConfig) -> tuple[int, int]:
    """The least and the greatest number of workers."""
    workers = cluster.num_workers
    return workers if isinstance(workers, tuple) else (workers, workers)


def resource_plan(cluster: ClusterConfig) -> str:
    """What the run needs, in a line for people."""
    least, most = worker_bounds(cluster)
    count = f"{least} to {most} workers" if least != most else f"{least} worker{'s' if least > 1 else ''}"
    if cluster.spare_workers:
        count += f" and {cluster.spare_workers} spare{'s' if cluster.spare_workers > 1 else ''}"
    each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources_per_worker(cluster).items()))
    return f"{count}, each with {each}"


def missing_resources(cluster: ClusterConfig, nodes: list[dict[str, float]]) -> str | None:
    """Why the smallest allowed number of workers does not fit on these nodes, or None if it does."""
    needed = resources_per_worker(cluster)
    room = sum(min(int(node.get(name, 0.0) / amount) for name, amount in needed.items() if amount) for node in nodes)
    needed_workers = worker_bounds(cluster)[0] + cluster.spare_workers
    if room >= needed_workers:
        return None
    there = ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in sorted(needed))
    return (
        f"the run needs {resource_plan(cluster)}, but {len(nodes)} node(s) with {there} in all hold only {room}. "
        f"Set {_fewer(cluster, room)}, ask for less in cluster.resources_per_worker, or use a larger cluster"
    )


def room_for_runs(cluster: ClusterConfig, nodes: Sequence[dict[str, float]]) -> int:
    """How many runs find room on these nodes at the same time, each with its greatest number of workers if possible."""
    needed = {name: amount for name, amount in resources_per_worker(cluster).items() if amount}
    workers = [min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes]
    least, most = (bound + cluster.spare_workers for bound in worker_bounds(cluster))
    return _fitting(workers, most, cluster.placement_strategy) or _fitting(workers, least, cluster.placement_strategy)


def _fitting(room: Sequence[int], num_workers: int, strategy: str) -> int:
    """Groups of so many workers that fit on nodes with room for so many workers each."""
    if strategy == "STRICT_PACK":
        return sum(there // num_workers for there in room)
    if strategy == "STRICT_SPREAD":
        count = 0
        while sum(min(there, count + 1) for there in room) >= (count + 1) * num_workers:
            count += 1
        return count
    return sum(room) // num_workers


def has_room_elsewhere(cluster: ClusterConfig, nodes: Sequence[str], leaving: Collection[str]) -> bool:
    """Whether all workers of a run find room on nodes that stay, once they have left where they are.

    Args:
        cluster: what they need.
        nodes: id of the node of each worker.
        leaving: ids of those that are going to be taken away.
    """
    needed = resources_per_worker(cluster)
    free = ray._private.state.available_resources_per_node()  # DeveloperAPI
    stay = [
        {name: there.get(name, 0.0) + nodes.count(node) * amount for name, amount in needed.items()}
        for node, there in free.items()
        if node not in leaving
    ]
    return room_for_runs(cluster, stay) > 0


def _fewer(cluster: ClusterConfig, room: int) -> str:
    if cluster.spare_workers and room >= worker_bounds(cluster)[0]:
        return f"cluster.spare_workers={room - worker_bounds(cluster)[0]}"
    return f"cluster.num_workers={max(room, 1)}{' and no cluster.spare_workers' if cluster.spare_workers else ''}"


def require_resources(cluster: ClusterConfig) -> None:
    """Refuse a plan that this Ray can never meet, instead of waiting for it in silence.

    A cluster that was joined may grow, so there the user is told and Ray waits.

    Raises:
        ConfigError: the machine is too small.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    missing = missing_resources(cluster, nodes)
    if missing is None:
        return
    if cluster.address is None:
        raise ConfigError(f"cluster.num_workers: {missing}.")
    logger.warning("%s. Waiting for the cluster to grow.", missing)
