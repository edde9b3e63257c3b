"""What Ray leaves to be done where the number of workers follows the cluster: ``num_workers: [least, most]``.

Ray looks at the cluster while workers train, ends all of them where more or fewer find room, and starts the others; so
it does after a failure.
"""

import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle

from ray_trainer.checkpoint.catalog import newest_step
from ray_trainer.cluster.internals import ControllerCallback, WorkerGroupCallback, missing_call, unless_missing
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

#: How often Ray is to look: what it sees is as old as that (Ray 2.60).
LOOKS_EVERY_S = 20.0
_ANSWERS_WITHIN_S = 5.0
_SAVES_WITHIN_S = 60.0
_ASKS_EVERY_S = 0.5


class ResizeGuard(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray's controller: has workers save before they are ended for others, and Ray see which nodes are lost.

    By itself Ray 2.60 does the steps since the last checkpoint again whenever a node joins. And after a failure it
    goes by what it saw of the cluster up to 20 s ago, and waits for workers on a node that is lost.

    Args:
        run: the run's directory.
        link: to the workers.
    """

    def __init__(self, run: Storage, link: ActorHandle) -> None:
        self._run = run
        self._link = link
        self._is_training = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        self._is_training = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Called by Ray when a worker has failed, or not all of them found room."""
        self._is_training = False
        try:
            look_at_cluster()
        except (ImportError, TypeError, ray.exceptions.RayError) as error:  # another version of Ray, or it is busy
            logger.warning("Ray could not be made to look at the cluster: %s", error)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called by Ray when it is going to start workers, after it has ended those that there are."""
        if self._is_training:
            self._is_training = False
            self._save()

    def _save(self) -> None:
        """Until there is a checkpoint more; workers that do not come to it are ended all the same."""
        deadline_s = time.monotonic() + _SAVES_WITHIN_S
        try:
            before = newest_step(self._run)
            self._link.want_save.remote()
            while newest_step(self._run) == before and time.monotonic() < deadline_s:
                time.sleep(_ASKS_EVERY_S)
        except OSError as error:
            logger.warning("Workers are ended before they have saved: %s", error)


def guards(run: Storage, link: ActorHandle) -> list[ResizeGuard]:
    """What Ray has to call; nothing where another version of Ray has no such calls. See `ResizeGuard`."""
    missing = missing_call(
        [
            (WorkerGroupCallback, "after_worker_group_training_start", 1),
            (ControllerCallback, "before_controller_execute_failure_decision", 1),
            (ControllerCallback, "before_controller_execute_resize_decision", 1),
        ]
    )
    return unless_missing(missing, "Steps are done again when a node joins", lambda: ResizeGuard(run, link))


def look_at_cluster() -> None:
    """Have Ray see at once which nodes there are; it looks every 20 s by itself. Rests on what is not public.

    Raises:
        ImportError, TypeError: another version of Ray has no such thing.
        RayError: no answer.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as scaling

    coordinator = scaling.get_or_create_autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=_ANSWERS_WITHIN_S)
