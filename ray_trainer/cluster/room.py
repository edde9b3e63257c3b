"""How many trials a cluster has room for, and the next to nothing that a trial itself occupies."""

import logging

import ray
from ray.tune import PlacementGroupFactory

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.session import resource_plan, room_for_runs
from ray_trainer.errors import ConfigError

logger = logging.getLogger(__name__)

_NEXT_TO_NOTHING = 0.001
_SHARED = 0.9  # of the driver's node, among trials that take turns


def concurrent_trials(cluster: ClusterConfig, wanted: int | None) -> int:
    """How many trials run at the same time.

    More than fit would wait for each other's workers. A cluster that was joined may grow, so there the user is
    believed.

    Raises:
        ConfigError: this machine has no room for as many as are wanted.
    """
    room = room_for_runs(cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if wanted is None:
        return max(1, room)
    if wanted > room and cluster.address is None:
        raise ConfigError(
            f"sweep.max_concurrent_trials ({wanted}): there is room for {room}, each of which needs "
            f"{resource_plan(cluster)}. Leave it out to have as many as fit."
        )
    if wanted > room:
        logger.warning("There is room for %d trials at the moment; the others wait for the cluster to grow.", room)
    return wanted


def driver_resources(num_turns: int | None) -> PlacementGroupFactory:
    """What a trial's own process reserves: no CPU, so that it cannot take one from its workers.

    It is placed on the node of the sweep's driver, where `fit` would build the datasets as well.

    Args:
        num_turns: trials that may be alive at the same time, where they take turns.
    """
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    names = [name for name in node["Resources"] if name.startswith("node:") and "__" not in name]
    share = _NEXT_TO_NOTHING if num_turns is None else int(_SHARED / num_turns * 10_000) / 10_000
    return PlacementGroupFactory([{names[0]: share}])
