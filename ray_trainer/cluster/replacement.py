"""Ray Train replaces a worker that died and leaves the others alone: all that rests on what it has for itself only.

Since 2.56 or so, a `Backend` whose ``has_replica_groups`` is set makes Ray's controller replace the worker that failed
in its place, instead of starting all of them again; torchft is what it was made for. None of it is documented. A
worker group of which every worker failed is started again as a whole.
"""

import inspect

from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig


class InPlaceBackend(Backend):
    """Workers that find each other on their own, at the start and after each replacement."""

    has_replica_groups = True


class InPlaceConfig(TorchConfig):
    """What makes a `TorchTrainer` replace workers one by one."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See `BackendConfig`."""
        return InPlaceBackend


def missing_interface() -> str | None:
    """What this Ray lacks of what replacing single workers needs; None if nothing."""
    if not hasattr(Backend, "has_replica_groups") or not hasattr(BackendConfig, "backend_cls"):
        return "ray.train.backend.Backend has no has_replica_groups"
    try:
        from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.worker_group import WorkerGroup
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
    except ImportError as error:
        return str(error)
    needed = (
        (TrainController, "_replace_bad_workers"),
        (WorkerGroup, "replace_replica_group"),
        (RayTrainWorker, "clear_result_queue"),
        (SynchronizationActor.__ray_metadata__.modified_class, "reset"),
    )
    for owner, name in needed:
        if not inspect.isfunction(getattr(owner, name, None)):
            return f"{owner.__name__} has no {name}"
    return None
