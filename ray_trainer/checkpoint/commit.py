"""Writing a checkpoint: files first, then their manifest, and all of it or nothing.

The order is what makes a crash harmless at any moment: a directory without a manifest is no checkpoint, and
a manifest is written only when every rank's files are durable.
"""

import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_all_ranks, on_rank_zero
from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.encoding import encode_plain
from ray_trainer.checkpoint.layout import (
    FileImage,
    checkpoint_name,
    discard,
    pack_rank_state,
    pack_state,
    read_manifest,
    size_problems,
    write_file,
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
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, NewerFormatError
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)


class Commit:
    """One checkpoint on its way from memory to storage.

    Every phase is agreed: a rank that fails in it makes all ranks raise, and nothing is committed.
    """

    def __init__(self, run: Storage, meta: CheckpointMeta, monitor: str, mode: str) -> None:
        self._run = run
        self._meta = meta
        self._monitor = monitor
        self._mode = mode
        self._started_s = time.perf_counter()
        self._name = ""
        self._manifest: Manifest | None = None
        self._images: list[FileImage] = []

    def carry_out(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> CheckpointRecord:
        """Write the state of rank 0, the rank state of every rank, and the manifest. Collective.

        Raises:
            CheckpointError: on all ranks; names the ranks that failed and why.
        """
        self._name = on_all_ranks(lambda: self._prepare(state, rank_state))[0]
        try:
            entries = on_all_ranks(self._write_files)
            return on_rank_zero(lambda: self._seal(entries))
        except CheckpointError:
            if distributed.rank() == 0:
                self._abandon()
            raise

    def _prepare(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> str:
        """Find everything that can't be stored before the first byte is written."""
        self._images = pack_rank_state(rank_state, distributed.rank())
        if distributed.rank() > 0:
            return ""
        self._images = pack_state(state) + self._images
        self._manifest = _draft(self._meta, self._monitor, self._mode)
        return _free_name(self._run, self._manifest)

    def _write_files(self) -> dict[str, FileEntry]:
        checkpoint = self._run.child(self._name)
        return {image.name: write_file(checkpoint, image) for image in self._images}

    def _seal(self, entries: list[dict[str, FileEntry]]) -> CheckpointRecord:
        assert self._manifest is not None  # rank 0 drafted it
        checkpoint = self._run.child(self._name)
        manifest = replace(
            self._manifest,
            files={name: entry for files in entries for name, entry in files.items()},
            seconds=time.perf_counter() - self._started_s,
        )
        if problems := size_problems(checkpoint, manifest):
            raise CheckpointError(
                f"Files that were written are not there: {'; '.join(problems)}. "
                f"Is {self._run.uri} the same storage on every node?"
            )
        checkpoint.sync()
        checkpoint.write(MANIFEST, manifest.to_bytes())
        return CheckpointRecord.of(self._name, checkpoint.uri, manifest)

    def _abandon(self) -> None:
        try:
            discard(self._run, self._name)
        except OSError as error:
            logger.warning("What a failed save left in %s could not be removed: %s", self._name, error)


def _draft(meta: CheckpointMeta, monitor: str, mode: str) -> Manifest:
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
        metrics=metrics,
        monitor=monitor,
        mode=mode,
        monitor_value=monitor_value(metrics, monitor),
        time=time.time(),
        seconds=0.0,
        attempt=meta.attempt,
        versions=library_versions(),
        num_threads=torch.get_num_threads(),
        files={},
    )


def _free_name(run: Storage, manifest: Manifest) -> str:
    """The first name for this step that no checkpoint has; what a broken save left under it is removed."""
    names = (checkpoint_name(manifest.epoch, manifest.step, copy) for copy in itertools.count(1))
    name = next(name for name in names if not _is_taken(run.child(name)))
    discard(run, name)
    return name


def _is_taken(checkpoint: Storage) -> bool:
    try:
        read_manifest(checkpoint)
    except (FileNotFoundError, CheckpointCorruptError):
        return False
    except NewerFormatError:
        pass
    return True
