"""What Ray has of a run: its controller, and the CPUs that the workers hold, for the driver to give back.

Ray keeps a placement group for as long as the job lives that made it. Ray Train's controller removes its own, and
a cleaner that asks Ray's dashboard does so when the controller is killed; where there is no dashboard, as on a
machine that trains for itself, the group of a trial that was killed would stay, and the next trial wait for ever
(ray-project/ray#54305). So would the cleaner, a process for each controller that is lost. And the group of a controller
that is ended while it waits for room would be placed later, and keep the CPUs.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util import placement_group_table, remove_placement_group

from ray_trainer.cluster.internals import (
    ControllerCallback,
    WorkerGroupCallback,
    groups_created_by,
    missing_call,
    missing_creators,
    unless_missing,
)

#: Events that tell of it. The first has the ``controller``, the second the ``cleaner``.
CONTROLLED, STARTED, ENDED = "controller_started", "workers_reserved", "workers_released"


class GroupRecorder(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray's controller: tells the driver of it, and whether there are workers."""

    def __init__(self, link: ActorHandle) -> None:
        self._link = link

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray before anything else."""
        self._tell(CONTROLLED, controller=ray.get_runtime_context().current_actor)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        cleaners = (getattr(callback, "_cleaner", None) for callback in getattr(worker_group, "_callbacks", ()))
        self._tell(STARTED, cleaner=next(filter(None, cleaners), None))  # let alone where this Ray has it elsewhere

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Called by Ray when it has ended all workers, and when not all of them could be started."""
        self._tell(ENDED)

    def _tell(self, event: str, **details: Any) -> None:
        self._link.announce.remote({"event": event, **details})


def recorders(link: ActorHandle) -> list[GroupRecorder]:
    """What tells the link of Ray's part of a run; nothing in a Ray that does not say."""
    missing = missing_call(
        [
            (ControllerCallback, "after_controller_start", 1),
            (WorkerGroupCallback, "after_worker_group_start", 1),
            (WorkerGroupCallback, "after_worker_group_shutdown", 1),
        ]
    )
    consequence = (
        "A run that waits for room can't be stopped, and if Ray's controller is lost its workers may keep their CPUs"
    )
    return unless_missing(missing or missing_creators(), consequence, lambda: GroupRecorder(link))


class Holdings:
    """What a start of a run has of Ray at the moment, as its controller tells.

    Attributes:
        has_workers: all of them have been started, and not been ended.
    """

    def __init__(self) -> None:
        self._controller: ActorHandle | None = None
        self._cleaner: ActorHandle | None = None
        self.has_workers = False

    def wait_for_room(self) -> bool:
        """Whether there are no workers, and no place for them: the cluster has no room, or they have just begun."""
        if self._controller is None or self.has_workers:
            return False
        groups = groups_created_by(self._controller)
        return all(placement_group_table(group).get("state") != "CREATED" for group in groups)

    def take(self, event: Mapping[str, Any]) -> None:
        """Learn of an event."""
        name = event["event"]
        if name == CONTROLLED:
            self._controller = event["controller"]
        elif name == STARTED:
            self._cleaner, self.has_workers = event["cleaner"], True
        elif name == ENDED:
            self.has_workers = False

    def end(self) -> None:
        """End the controller, and `free` what it had."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(self._controller)
        self.free()

    def free(self) -> None:
        """End the workers and the cleaner, and give up what they wait for; what is gone is fine."""
        if self._cleaner is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(self._cleaner)
        if self._controller is not None:
            for group in groups_created_by(self._controller):
                remove_placement_group(group)
