"""The CPUs that a run's workers hold in Ray, so that they can be given back when nobody else does.

Ray keeps a placement group for as long as the job lives that made it. Ray Train's controller removes its own, and
a helper that asks Ray's dashboard does so when the controller is killed; where there is no dashboard, as on a
machine that trains for itself, the group of a trial that was killed would stay, and the next trial wait for ever
(ray-project/ray#54305).
"""

from typing import Any

from ray._raylet import PlacementGroupID
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

RESERVED = "workers_reserved"


class GroupRecorder(WorkerGroupCallback):
    """Runs in Ray's controller: tells which placement group the workers are in."""

    def __init__(self, link: ActorHandle | None) -> None:
        self._link = link

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        if self._link is not None:
            group = worker_group.get_worker_group_state().placement_group_handle.placement_group
            self._link.announce.remote({"event": RESERVED, "group": group.id.hex()})


def free_group(group: str) -> None:
    """Remove a placement group and what runs in it; one that is gone is fine."""
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
