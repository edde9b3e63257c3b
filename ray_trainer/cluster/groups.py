"""The CPUs that a run's workers hold in Ray, so that they can be given back when nobody else does.

Ray keeps a placement group for as long as the job lives that made it. Ray Train's controller removes its own, and
a helper that asks Ray's dashboard does so when the controller is killed; where there is no dashboard, as on a
machine that trains for itself, the group of a trial that was killed would stay, and the next trial wait for ever
(ray-project/ray#54305).
"""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ray_trainer.cluster.internals import WorkerGroupCallback, missing_groups, unless_missing

RESERVED = "workers_reserved"


class GroupRecorder(WorkerGroupCallback):
    """Runs in Ray's controller: tells which placement group the workers are in."""

    def __init__(self, link: ActorHandle) -> None:
        self._link = link

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._link.announce.remote({"event": RESERVED, "group": group.id.hex()})


def recorders(link: ActorHandle) -> list[GroupRecorder]:
    """What tells the link of the workers' placement group; nothing in a Ray that does not say which one it is."""
    return unless_missing(
        missing_groups(), "If Ray's controller is lost its workers may keep their CPUs", lambda: GroupRecorder(link)
    )


def free_group(group: str) -> None:
    """Remove a placement group and what runs in it; one that is gone is fine."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
