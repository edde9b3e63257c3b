"""Writing a checkpoint: files first, then their manifest, and all of it or nothing.

The order is what makes a crash harmless at any moment: a directory without a manifest is no checkpoint, and
a manifest is written only when every rank's files are durable.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_all_ranks, on_rank_zero
from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.encoding import encode_plain
from ray_trainer.checkpoint.images import FileImage
from ray_trainer.checkpoint.layout import (
    StateFiles,
    checkpoint_name,
    checkpoint_order,
    discard,
    pack_rank_state,
    pack_shards,
    pack_state,
)
from ray_trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointMeta,
    FileEntry,
    Manifest,
    config_hash,
    library_versions,
    monitor_value,
    plain_metrics,
)
from ray_trainer.checkpoint.retention import RetentionPolicy
from ray_trainer.checkpoint.stripes import Stripe
from ray_trainer.checkpoint.writer import DirectWriter, Writer
from ray_trainer.errors import CheckpointError, LeaseLostError
from ray_trainer.storage import Storage
from ray_trainer.storage.sealing import Seal, Sealed, WrittenFile

logger = logging.getLogger(__name__)


class Commit:
    """One checkpoint on its way from memory to storage.

    Every phase is agreed: a rank that fails in it makes all ranks raise, and nothing is committed. Between
    phases each rank's writer works, and training may go on::

        begin    → each rank's files are taken and being written
        advance  → their checksums are shared; rank 0 declares the checkpoint whole
        advance  → it is whole

    Attributes:
        step: that it holds.
        record: of the checkpoint once it is whole.
        stall_s: how long training waited: for the copy on the slowest rank, or for everything if it is immediate.
        durable_s: from its beginning until it was whole.
    """

    def __init__(
        self, run: Storage, writer_for: Callable[[int], Writer], meta: CheckpointMeta, policy: RetentionPolicy
    ) -> None:
        """Prepare to commit.

        Args:
            run: where the checkpoint goes.
            writer_for: who writes files of so many bytes; equal on all ranks.
            meta: where in the run this is.
            policy: which checkpoints stay afterwards.
        """
        self._run = run
        self._writer_for = writer_for
        self._writer: Writer = DirectWriter()
        self._images: list[FileImage] = []
        self._meta = meta
        self._policy = policy
        self._started_at_s = time.monotonic()
        self._name = ""
        self._manifest: Manifest | None = None
        self._is_sealing = False
        self.step = meta.step
        self.record: CheckpointRecord | None = None
        self.deleted: tuple[str, ...] = ()
        self.stall_s = 0.0
        self.durable_s = 0.0

    def begin(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Take the state of rank 0 and the rank state of every rank. Collective.

        Raises:
            CheckpointError: on all ranks; names the ranks that failed and why.
        """
        started_s = time.perf_counter()
        packed = on_all_ranks(lambda: self._prepare(state, rank_state))
        _require_same_division([division for _, _, division in packed])
        self._name = packed[0][0]
        self._writer = self._writer_for(max(size_bytes for _, size_bytes, _ in packed))
        self._writer.write(self._run.child(self._name), self._images)
        self._images = []
        self.stall_s = time.perf_counter() - started_s

    @property
    def is_immediate(self) -> bool:
        """Whether it is so small that nothing goes on beside training."""
        return isinstance(self._writer, DirectWriter)

    def is_done(self) -> bool:
        """Whether this rank could `advance` without waiting."""
        return self._writer.is_done()

    def advance(self, records: Callable[[], list[CheckpointRecord]]) -> bool:
        """Go on to the next phase, waiting for this one; whether the checkpoint is whole. Collective.

        Args:
            records: the checkpoints there are, of which some may have to go; asked on rank 0.

        Raises:
            CheckpointError: on all ranks; names the ranks that failed and why.
        """
        try:
            if self._is_sealing:
                self.record, self.deleted, self.durable_s = on_rank_zero(self._conclude)
                if self.is_immediate:
                    self.stall_s = self.durable_s  # training has waited for all of it
                return True
            outcomes = on_all_ranks(lambda: (self._writer.result(), self.stall_s))
            self.stall_s = max(stall_s for _, stall_s in outcomes)
            on_rank_zero(lambda: self._seal([files for files, _ in outcomes], records()))
            self._is_sealing = True
            return False
        except CheckpointError:
            if distributed.rank() == 0:
                self._abandon()
            raise

    def _prepare(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> tuple[str, int, str]:
        """Find everything that can't be stored before the first byte is written."""
        self._images, division = files_of_rank(state, rank_state)
        name = ""
        if distributed.rank() == 0:
            self._manifest = draft(self._meta, self._policy, self._run.fence.epoch)
            name = _free_name(self._run, self._manifest)
        return name, sum(image.size_bytes for image in self._images), division

    def _seal(self, written: list[dict[str, WrittenFile]], records: list[CheckpointRecord]) -> None:
        assert self._manifest is not None  # rank 0 drafted it
        files = {name: FileEntry(*file) for files in written for name, file in files.items()}
        self._manifest = replace(self._manifest, files=files, seconds=time.monotonic() - self._started_at_s)
        record = self._record()
        others = [other for other in records if other.name != record.name]
        everything = sorted([*others, record], key=lambda each: checkpoint_order(each.name) or ())
        removable = self._policy.removable(everything, protected=[record.name])
        self._writer.seal(
            Seal(
                self._run,
                self._name,
                sizes={name: entry.size for name, entry in files.items()},
                manifest=(MANIFEST, self._manifest.to_bytes()),
                obsolete=tuple(each.name for each in removable),
            )
        )

    def _conclude(self) -> tuple[CheckpointRecord, tuple[str, ...], float]:
        sealed: Sealed = self._writer.result()
        return self._record(), sealed.deleted, sealed.at_s - self._started_at_s

    def _record(self) -> CheckpointRecord:
        assert self._manifest is not None  # rank 0 drafted it
        return CheckpointRecord.of(self._name, self._run.child(self._name).uri, self._manifest)

    def _abandon(self) -> None:
        try:
            discard(self._run, self._name)
        except (OSError, LeaseLostError) as error:
            logger.warning("What a failed save left in %s could not be removed: %s", self._name, error)


def files_of_rank(state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> StateFiles:
    """The files that this rank writes: its stripe of the state, and what it alone has.

    Raises:
        CheckpointError: something can't be stored; names its path.
    """
    rank = distributed.rank()
    own = pack_shards(state, rank) + pack_rank_state(rank_state, rank)
    images, division = pack_state(state, Stripe(rank, distributed.world_size()))
    return StateFiles(images + own, division)


def _require_same_division(divisions: list[str]) -> None:
    odd = [rank for rank, division in enumerate(divisions) if division != divisions[0]]
    if odd:
        raise CheckpointError(
            f"The optimizer's state has other names or shapes on rank(s) {', '.join(map(str, odd))} than on rank 0. "
            "Build the same optimizer, for the same parameters in the same order, on every rank."
        )


def draft(meta: CheckpointMeta, policy: RetentionPolicy, fencing_epoch: int) -> Manifest:
    """The manifest as far as it is known before the files are written."""
    metrics = plain_metrics(meta.metrics)
    config = dict(meta.config)
    return Manifest(
        step=meta.step,
        epoch=meta.epoch,
        world_size=distributed.world_size(),
        global_batch_size=meta.global_batch_size,
        config=config,
        config_hash=config_hash(encode_plain(config, ("config",))),
        data_fingerprint=meta.data_fingerprint,
        data=dict(meta.data),
        metrics=metrics,
        monitor=policy.monitor,
        mode=policy.mode,
        monitor_value=monitor_value(metrics, policy.monitor),
        time=time.time(),
        seconds=0.0,
        attempt=meta.attempt,
        versions=library_versions(),
        num_threads=torch.get_num_threads(),
        fencing_epoch=fencing_epoch,
        files={},
    )


def _free_name(run: Storage, manifest: Manifest) -> str:
    """The first name for this step that no checkpoint has; what an unfinished save left under it is removed."""
    names = (checkpoint_name(manifest.epoch, manifest.step, copy) for copy in itertools.count(1))
    name = next(name for name in names if not run.child(name).exists(MANIFEST))
    discard(run, name)
    return name
