"""Ray Train replaces a worker that died and leaves the others alone: all that rests on what it has for itself only.

Since 2.56 or so, a `Backend` whose ``has_replica_groups`` is set makes Ray's controller replace the worker that failed
in its place, instead of starting all of them again; torchft is what it was made for. None of it is documented. A
worker group of which every worker failed is started again as a whole.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.util import placement_group_table

from ray_trainer.cluster.internals import WorkerGroupCallback, mentions, missing_call, missing_groups

logger = logging.getLogger(__name__)

#: The second one is of workers that Ray ends for want of memory.
_DEATHS = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
_ATTEMPTS = 3
_ANSWERS_WITHIN_S = 30.0
_MOVES_WITHIN_S = 5.0
_NO_ROOM = "the cluster has no room for a worker that is missing; it is started as soon as there is"


class InPlaceBackend(Backend):
    """Workers that find each other on their own, at the start and after each replacement."""

    has_replica_groups = True


class InPlaceConfig(TorchConfig):
    """What makes a `TorchTrainer` replace workers one by one."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See `BackendConfig`."""
        return InPlaceBackend


class ReplacementGuard(WorkerGroupCallback):
    """Runs in Ray's controller: lets a worker be replaced while another one is dead or hangs.

    By itself Ray 2.60 asks every other worker to forget its reports, and waits for the answers. One that has died as
    well then ends the run, whatever ``max_failures`` says, and one that hangs stops the controller for good.

    Where the node of the worker is lost and no other one has room, the controller waits for one, and does nothing
    else meanwhile.

    Args:
        tell: records an event.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray at each start of workers."""
        # starts a process beside each newcomer that would manage no datasets: ours do not go through Ray Train
        callbacks = worker_group._execution_group_callbacks
        callbacks[:] = [each for each in callbacks if type(each).__name__ != "DatasetsCallback"]
        replace = worker_group.replace_replica_group

        def replace_guarded(index: int) -> None:
            is_told = False
            for attempt in range(1, _ATTEMPTS + 1):
                if not is_told and not _has_room(worker_group):  # which Ray may learn by an attempt only
                    is_told = True
                    self._tell("waiting_for_room", reason=_NO_ROOM)
                for place, group in enumerate(worker_group.get_replica_groups()):
                    if place != index and group.is_active() and not all(map(_answers, group.get_workers())):
                        group.shutdown()  # it is replaced in its turn, once Ray has seen that it failed
                try:
                    replace(index)
                except Exception as error:
                    has_died = any(isinstance(each, _DEATHS) for each in (error, error.__cause__))
                    if not has_died or attempt == _ATTEMPTS:
                        raise
                    logger.warning("Worker %d could not be replaced, because one has died since.", index)
                else:
                    return

        worker_group.replace_replica_group = replace_guarded


def _has_room(worker_group: Any) -> bool:
    """Whether the workers' places are on nodes that are there; those of a lost one may be moving to another."""
    group = worker_group.get_worker_group_state().placement_group_handle.placement_group
    deadline_s = time.monotonic() + _MOVES_WITHIN_S
    while placement_group_table(group).get("state") != "CREATED":
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def _answers(worker: Any) -> bool:
    actor: ActorHandle = worker.actor
    try:
        ray.get(actor.get_metadata.remote(), timeout=_ANSWERS_WITHIN_S)
    except ray.exceptions.RayError:
        return False
    return True


def missing_interface() -> str | None:
    """What this Ray lacks of what replacing single workers needs; None if nothing."""
    if not hasattr(Backend, "has_replica_groups") or not hasattr(BackendConfig, "backend_cls"):
        return "ray.train.backend.Backend has no has_replica_groups"
    try:
        from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.worker_group import WorkerGroup
        from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker, Worker
    except ImportError as error:
        return str(error)
    calls = (
        (TrainController, "_replace_bad_workers", 1),
        (WorkerGroup, "replace_replica_group", 1),
        (WorkerGroup, "get_replica_groups", 0),
        (ReplicaGroup, "is_active", 0),
        (ReplicaGroup, "get_workers", 0),
        (ReplicaGroup, "shutdown", 0),
        (RayTrainWorker, "get_metadata", 0),
        (RayTrainWorker, "clear_result_queue", 0),
        (_class_of(SynchronizationActor), "reset", 0),
    )
    missing = missing_groups() or missing_call(calls)
    if missing is None and not mentions(TrainController._replace_bad_workers, "replace_replica_group"):
        return "TrainController replaces workers in another way"
    if missing is None and not mentions(WorkerGroup.__init__, "_execution_group_callbacks"):
        return "WorkerGroup has no _execution_group_callbacks"
    if missing is None and "actor" not in Worker.__annotations__:
        return "Worker has no actor"
    return missing


def _class_of(actor: Any) -> Any:
    return getattr(getattr(actor, "__ray_metadata__", None), "modified_class", actor)
