"""What Ray has of a run: its controller, and the CPUs that the workers hold, for the driver to give back.

Ray keeps a placement group for as long as the job lives that made it. Ray Train's controller removes its own, and
a cleaner that asks Ray's dashboard does so when the controller is killed; where there is no dashboard, as on a
machine that trains for itself, the group of a trial that was killed would stay, and the next trial wait for ever
(ray-project/ray#54305). So would the cleaner, a process for each controller that is lost.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ray_trainer.cluster.internals import (
    ControllerCallback,
    WorkerGroupCallback,
    missing_call,
    missing_groups,
    unless_missing,
)

RESERVED = "workers_reserved"


class GroupRecorder(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray's controller: tells the driver of it, and of the placement group that the workers are in."""

    def __init__(self, link: ActorHandle) -> None:
        self._link = link

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray before anything else."""
        self._link.announce.remote(
            {"event": "controller_started", "controller": ray.get_runtime_context().current_actor}
        )

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Called by Ray when it has ended all workers, and when not all of them could be started."""
        self._link.announce.remote({"event": "workers_released"})

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        cleaners = (getattr(callback, "_cleaner", None) for callback in getattr(worker_group, "_callbacks", ()))
        cleaner = next(filter(None, cleaners), None)  # where this Ray has it elsewhere, it is let alone
        self._link.announce.remote({"event": RESERVED, "group": group.id.hex(), "cleaner": cleaner})


def recorders(link: ActorHandle) -> list[GroupRecorder]:
    """What tells the link of Ray's part of a run; nothing in a Ray that does not say."""
    missing = missing_groups() or missing_call(
        [
            (ControllerCallback, "after_controller_start", 1),
            (WorkerGroupCallback, "after_worker_group_shutdown", 1),
        ]
    )
    consequence = (
        "A run that waits for room can't be stopped, and if Ray's controller is lost its workers may keep their CPUs"
    )
    return unless_missing(missing, consequence, lambda: GroupRecorder(link))


class Holdings:
    """What a start of a run has of Ray at the moment, as its controller tells.

    Attributes:
        has_workers: all of them have been started, and not been ended.
        since_s: by the monotonic clock, when that changed last.
    """

    def __init__(self) -> None:
        self._controller: ActorHandle | None = None
        self._reserved: Mapping[str, Any] | None = None
        self.has_workers = False
        self.since_s = time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether the controller has told of itself."""
        return self._controller is not None

    @property
    def had_workers(self) -> bool:
        """Whether there are workers, or were some."""
        return self._reserved is not None

    def take(self, event: Mapping[str, Any]) -> None:
        """Learn of an event."""
        match event:
            case {"event": "controller_started", "controller": controller}:
                self._controller = controller
            case {"event": "workers_reserved"}:
                self._reserved, self.has_workers, self.since_s = event, True, time.monotonic()
            case {"event": "workers_released"}:
                self.has_workers, self.since_s = False, time.monotonic()

    def free(self) -> None:
        """End the controller and the workers, if they have not ended."""
        if self._controller is not None:
            ray.kill(self._controller)
        if self._reserved is not None:
            free_group(self._reserved)


def free_group(reserved: Mapping[str, Any]) -> None:
    """Remove a placement group, what runs in it, and its cleaner; what is gone is fine.

    Args:
        reserved: the event that told of it.
    """
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(reserved["group"]))))
    if reserved["cleaner"] is not None:
        with suppress(ray.exceptions.RayError):
            ray.kill(reserved["cleaner"])
