"""`Runtime` over Ray Train: the worker's device, the run's directory, reports, and the link to the driver."""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, cast

import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointUploadMode

from ray_trainer import distributed
from ray_trainer.cluster.link import WorkerLink
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage


class RayRuntime:
    """Inside a worker of a `TorchTrainer`."""

    def __init__(self, link: ActorHandle | None, description: Mapping[str, Any]) -> None:
        """Take what the driver sent along.

        Args:
            link: to the driver; only rank 0 uses it.
            description: the resolved sections of the run file that training does not know itself.
        """
        self._context = ray.train.get_context().get_storage()  # DeveloperAPI: where Ray keeps this run
        self._storage = Storage.of(self._context.storage_filesystem, self._context.experiment_fs_path)
        self._description = description
        self._link = WorkerLink(link if distributed.rank() == 0 else None)
        self.stopped = Stop.NONE

    @property
    def device(self) -> torch.device:
        """See `Runtime`."""
        return cast(torch.device, ray.train.torch.get_device())

    @property
    def storage(self) -> Storage:
        """See `Runtime`."""
        return self._storage

    def __enter__(self) -> "RayRuntime":
        """Open the link."""
        self._link.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the link."""
        self._link.close()

    def describe(self) -> Mapping[str, Any]:
        """See `Runtime`."""
        return self._description

    def requested_stop(self) -> Stop:
        """See `Runtime`."""
        return self._link.stop

    def show(self, progress: Mapping[str, Any]) -> None:
        """See `Runtime`."""
        self._link.show(progress)

    def announce(self, event: str, details: Mapping[str, Any]) -> None:
        """See `Runtime`."""
        self._link.announce({"event": event, **details})

    def checkpoint_committed(self, uri: str, metrics: Mapping[str, float]) -> None:
        """Tell Ray of a checkpoint that lies in the run's directory already.

        Ray turns values that are not finite into null, and dies of numpy scalars; it gets neither.
        """
        checkpoint = None
        if distributed.rank() == 0:
            path = self._context.build_checkpoint_path_from_name(uri.rstrip("/").rsplit("/", 1)[-1])
            checkpoint = ray.train.Checkpoint(path=path, filesystem=self._context.storage_filesystem)
        plain = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        ray.train.report(plain, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def conclude(self, stop: Stop) -> None:
        """See `Runtime`; the worker's return value carries it to the driver."""
        self.stopped = stop
