"""The CPUs that a run's workers hold in Ray, so that they can be given back when nobody else does.

Ray keeps a placement group for as long as the job lives that made it. Ray Train's controller removes its own, and
a cleaner that asks Ray's dashboard does so when the controller is killed; where there is no dashboard, as on a
machine that trains for itself, the group of a trial that was killed would stay, and the next trial wait for ever
(ray-project/ray#54305). So would the cleaner, a process for each controller that is lost.
"""

from collections.abc import Mapping
from contextlib import suppress
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
        cleaners = (getattr(callback, "_cleaner", None) for callback in getattr(worker_group, "_callbacks", ()))
        cleaner = next(filter(None, cleaners), None)  # where this Ray has it elsewhere, it is let alone
        self._link.announce.remote({"event": RESERVED, "group": group.id.hex(), "cleaner": cleaner})


def recorders(link: ActorHandle) -> list[GroupRecorder]:
    """What tells the link of the workers' placement group; nothing in a Ray that does not say which one it is."""
    return unless_missing(
        missing_groups(), "If Ray's controller is lost its workers may keep their CPUs", lambda: GroupRecorder(link)
    )


def free_group(reserved: Mapping[str, Any]) -> None:
    """Remove a placement group, what runs in it, and its cleaner; what is gone is fine.

    Args:
        reserved: the event that told of it.
    """
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(reserved["group"]))))
    if reserved["cleaner"] is not None:
        with suppress(ray.exceptions.RayError):
            ray.kill(reserved["cleaner"])
