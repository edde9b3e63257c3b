"""`Runtime` over Ray Train: the worker's device, the run's directory, reports, and the link to the driver."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointUploadMode

from ray_trainer import distributed
from ray_trainer.cluster.departure import Departure
from ray_trainer.cluster.link import WorkerLink
from ray_trainer.cluster.monitor import Monitor
from ray_trainer.cluster.notices import Notices
from ray_trainer.cluster.storage import storage_of
from ray_trainer.cluster.telemetry import Telemetry
from ray_trainer.cluster.termination import is_to_go
from ray_trainer.cluster.vault import RayVault
from ray_trainer.pulse.deadlines import Terms
from ray_trainer.runtime import Stop, fence_on_all_ranks
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import follow
from ray_trainer.storage.snapshots import ProcessMemory


class RayRuntime:
    """Inside a worker of a `TorchTrainer`."""

    def __init__(
        self,
        link: ActorHandle | None,
        description: Mapping[str, Any],
        lease: int,
        vault: RayVault | None,
        hang: Terms | None,
        has_room: Callable[[Sequence[str], Collection[str]], bool],
        survivor: ProcessMemory | None = None,
    ) -> None:
        """Take what the driver sent along.

        Args:
            link: to the driver; only rank 0 uses it.
            description: the resolved sections of the run file that training does not know itself.
            lease: the driver's; this start of the workers claims the run on its behalf.
            vault: for snapshots in memory, if there are to be any.
            hang: when this worker counts as hung; None for never.
            has_room: whether workers on some nodes find room when some nodes are left.
            survivor: memory of this process, if a rank that dies is replaced alone.
        """
        self._context = ray.train.get_context().get_storage()  # DeveloperAPI: where Ray keeps this run
        self._storage = storage_of(self._context.storage_filesystem, self._context.experiment_fs_path)
        self._lease = lease
        self._vault = vault
        self._has_room = has_room
        self._survivor = survivor
        self._description = description
        self._link = WorkerLink(link if distributed.rank() == 0 else None)
        run = self._storage.path.rstrip("/").rpartition("/")[2]
        self._telemetry = Telemetry(run, self._storage, is_on=distributed.rank() == 0)
        self.monitor = Monitor(hang, ray.util.get_node_ip_address())
        self._notices: Notices | None = None
        self.stopped = Stop.NONE

    @property
    def device(self) -> torch.device:
        """See `Runtime`."""
        return cast(torch.device, ray.train.torch.get_device())

    @property
    def storage(self) -> Storage:
        """See `Runtime`."""
        return self._storage

    @property
    def snapshots(self) -> RayVault | None:
        """See `Runtime`."""
        return self._vault

    @property
    def survivor(self) -> ProcessMemory | None:
        """See `Runtime`."""
        return self._survivor

    def __enter__(self) -> "RayRuntime":
        """Open the link. Collective."""
        nodes = distributed.gather_objects(ray.get_runtime_context().get_node_id())
        if distributed.rank() == 0:
            departure = Departure(nodes, outlives=self._survivor is not None)
            self._notices = Notices(lambda: self._storage, departure, partial(self._has_room, nodes))
            self._notices.open()
        self._link.open()
        self._telemetry.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the link."""
        self._telemetry.close()
        self._link.close()
        if self._notices is not None:
            self._notices.close()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """See `Runtime`; the driver renews the lease."""
        storage = self._storage
        self._storage = storage.fenced(fence_on_all_ranks(lambda: follow(storage, self._lease)))
        try:
            with self.monitor.watching(self._storage):
                yield
        finally:
            self._storage = storage

    def describe(self) -> Mapping[str, Any]:
        """See `Runtime`."""
        return self._description

    def requested_stop(self) -> Stop:
        """See `Runtime`."""
        noticed = self._notices.stop if self._notices else Stop.NONE
        return max(self._link.stop, noticed, Stop.PREEMPTION if is_to_go() else Stop.NONE)

    def requested_save(self) -> bool:
        """See `Runtime`; the head is lost, a node is going to be, or Ray is going to end the workers for others."""
        is_noticed = self._notices is not None and self._notices.save.take()
        return self._link.save.take() or is_noticed

    def show(self, progress: Mapping[str, Any]) -> None:
        """See `Runtime`."""
        self._link.show(progress)
        self._telemetry.progress(progress)

    def announce(self, event: str, details: Mapping[str, Any]) -> None:
        """See `Runtime`."""
        self._link.announce({"event": event, **details})
        self._telemetry.event(event, details)

    def checkpoint_committed(self, uri: str, metrics: Mapping[str, float]) -> None:
        """Tell Ray of a checkpoint that lies in the run's directory already.

        Ray turns values that are not finite into null, and dies of numpy scalars; it gets neither. It waits for the
        report of each of its workers, so where some do not train it gets to know at the end of the run, or at the
        next start.
        """
        context = ray.train.get_context()
        if context.get_world_size() > distributed.world_size():
            return
        checkpoint = None
        if context.get_world_rank() == 0:  # other ranks of ours may be where the others are
            path = self._context.build_checkpoint_path_from_name(uri.rstrip("/").rsplit("/", 1)[-1])
            checkpoint = ray.train.Checkpoint(path=path, filesystem=self._context.storage_filesystem)
        plain = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        ray.train.report(plain, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def conclude(self, stop: Stop) -> None:
        """See `Runtime`; the worker's return value carries it to the driver."""
        self.stopped = stop
