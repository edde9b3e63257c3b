"""Snapshots that live in memory outside of the workers, for a restart of workers that loses next to nothing.

A snapshot has the files of a checkpoint, checksums included, and is read by the same code. It is complete when
every rank's part is there; its loss only costs time.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pyarrow import fs as pafs

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_all_ranks, on_rank_zero
from ray_trainer.checkpoint.arena import Arena
from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.commit import draft, files_of_rank
from ray_trainer.checkpoint.images import copy_in, lay_out
from ray_trainer.checkpoint.layout import read_rank_state, read_state
from ray_trainer.checkpoint.manager import CheckpointManager
from ray_trainer.checkpoint.manifest import CheckpointMeta, FileEntry, Manifest
from ray_trainer.checkpoint.restore import LoadedCheckpoint
from ray_trainer.checkpoint.shards import Share
from ray_trainer.checkpoint.tiers import Tier
from ray_trainer.errors import CheckpointError
from ray_trainer.storage import Storage
from ray_trainer.storage.sealing import FileInMemory
from ray_trainer.storage.snapshots import SnapshotPart, SnapshotStore

logger = logging.getLogger(__name__)


class MemoryTier:
    """Snapshots of a run in a memory that outlives its workers. One at a time.

    Args:
        store: where they are kept.
        manager: of the run's checkpoints on storage, which are used where they are newer.
    """

    def __init__(self, store: SnapshotStore, manager: CheckpointManager) -> None:
        self._store = store
        self._manager = manager
        self._arena: Arena | None = None
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def due(self, step: int) -> bool:
        """Whether a snapshot of this step is wanted."""
        return step % self._store.every_n_steps == 0

    def is_busy(self) -> bool:
        """Whether the last snapshot is still on its way."""
        return self._thread is not None and self._thread.is_alive()

    def take(self, state: Mapping[str, Any], rank_state: Mapping[str, Any], meta: CheckpointMeta) -> None:
        """Take this rank's part of a snapshot; it is complete once every rank has done so.

        Training waits for the copy only. What cannot be kept is logged.
        """
        try:
            images, _ = files_of_rank(state, rank_state)
            places, end = lay_out(images)
            memory = self._room_for(end)
        except (CheckpointError, OSError) as error:
            self._tell_failure(error)
            return
        copy_in(images, places, memory)
        rank, epoch = distributed.rank(), self._manager.storage.fence.epoch
        header = draft(meta, self._manager.policy, epoch).to_bytes() if rank == 0 else b""
        part = SnapshotPart((meta.attempt, meta.step), rank, distributed.world_size(), header, ())
        content = memory[:end].numpy()
        self._thread = threading.Thread(target=self._bring, args=(part, places, content), daemon=True)
        self._thread.start()

    def restore(self, share: Share | None) -> LoadedCheckpoint | None:
        """Load the newest complete snapshot; None if storage is to be used, having a newer one. Collective."""
        loaded: LoadedCheckpoint | None = None

        def load() -> None:
            nonlocal loaded
            loaded = load_held(self._store, parts or [], share)

        parts = on_rank_zero(self._newest)
        if parts is None:
            return None
        try:
            on_all_ranks(load)
        except CheckpointError as error:
            logger.warning("The snapshot of step %d in memory is not used: %s", parts[0].key[1], error)
            return None
        return loaded

    def close(self) -> None:
        """Wait for the snapshot on its way, and free the memory."""
        if self._thread is not None:
            self._thread.join()
        if self._arena is not None:
            self._arena.close()
        self._thread = self._arena = None

    def _bring(self, part: SnapshotPart, places: list[FileInMemory], content: NDArray[np.uint8]) -> None:
        files = with_checksums(content, places)
        try:
            self._store.put(replace(part, files=files), content)
        except OSError as error:
            self._tell_failure(error)
        else:
            self._has_failed = False

    def _tell_failure(self, error: Exception) -> None:
        if not self._has_failed:
            logger.warning(
                "No snapshot in memory: %s. Training goes on; checkpoints on storage are not affected.", error
            )
        self._has_failed = True

    def _newest(self) -> list[SnapshotPart] | None:
        try:
            parts = self._store.newest()
        except OSError as error:
            logger.warning("Snapshots in memory cannot be reached: %s", error)
            return None
        return parts if parts and parts[0].key[1] >= self._manager.newest_step() else None

    def _room_for(self, size_bytes: int) -> torch.Tensor:
        if self._arena is None or self._arena.size_bytes < size_bytes:
            self.close()
            self._arena = Arena(size_bytes)
        return self._arena.memory


def with_checksums(content: NDArray[np.uint8], places: Sequence[FileInMemory]) -> tuple[tuple[FileInMemory, str], ...]:
    """The files that lie in memory, each with the checksum of what it holds now."""
    return tuple((place, _checksum(content, place)) for place in places)


class Contents(Protocol):
    """Where the bytes of a snapshot's parts are."""

    def content(self, part: SnapshotPart) -> NDArray[np.uint8]:
        """The bytes of a part."""


def load_held(store: Contents, parts: Sequence[SnapshotPart], share: Share | None = None) -> LoadedCheckpoint:
    """Read a snapshot as a checkpoint is read, checksums included."""
    held = _HeldFiles(store, parts)
    manifest = held.manifest
    name = f"snapshot of step {manifest.step}"
    return LoadedCheckpoint(
        state=read_state(held, manifest, share),
        rank_state=read_rank_state(held, manifest, distributed.rank()),
        manifest=manifest,
        record=CheckpointRecord.of(name, f"memory:{name}", manifest),
        tier=Tier.MEMORY,
    )


class _HeldFiles(Storage):
    """The files of a snapshot, for reading; a rank's part is fetched when a file in it is."""

    def __init__(self, store: Contents, parts: Sequence[SnapshotPart]) -> None:
        super().__init__(pafs.LocalFileSystem(), "/")
        self._store = store
        self._places = {place.name: (part, place) for part in parts for place, _ in part.files}
        self._contents: dict[int, NDArray[np.uint8]] = {}
        files = {place.name: FileEntry(place.size_bytes, digest) for part in parts for place, digest in part.files}
        self.manifest = replace(Manifest.from_bytes(parts[0].manifest), files=files)

    def size(self, name: str) -> int:
        """See `Storage`."""
        return self._places[name][1].size_bytes

    def blocks(self, name: str, block_bytes: int = 16 << 20) -> Iterator[bytes | memoryview]:
        """See `Storage`; views, not copies."""
        part, place = self._places[name]
        if part.rank not in self._contents:
            self._contents[part.rank] = self._store.content(part)
        content = self._contents[part.rank][place.offset : place.offset + place.size_bytes]
        for start in range(0, len(content), block_bytes):
            yield content[start : start + block_bytes].data.toreadonly()


def _checksum(content: NDArray[np.uint8], place: FileInMemory) -> str:
    return xxhash.xxh3_128(content[place.offset : place.offset + place.size_bytes].data).hexdigest()
