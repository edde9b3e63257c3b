"""The checkpoints of a run: committing, keeping, restoring."""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import direct
from ray_trainer.checkpoint.catalog import (
    Catalog,
    CheckpointRecord,
    checkpoint_names,
    newest_step,
    open_storage,
    resolve,
)
from ray_trainer.checkpoint.choice import newest_first, select, set_aside
from ray_trainer.checkpoint.commit import Commit, files_of_rank
from ray_trainer.checkpoint.direct import CheckpointMetadata
from ray_trainer.checkpoint.layout import checkpoint_order, discard, has_lost_manifest
from ray_trainer.checkpoint.manifest import MANIFEST, CheckpointMeta
from ray_trainer.checkpoint.restore import (
    LoadedCheckpoint,
    Rejection,
    Selection,
    load_first_whole,
    load_named,
    restore_on_all_ranks,
)
from ray_trainer.checkpoint.retention import Mode, RetentionPolicy
from ray_trainer.checkpoint.shards import Share
from ray_trainer.checkpoint.writer import SMALL_BYTES, BackgroundWriter, DirectWriter, Writer
from ray_trainer.errors import CheckpointNotFoundError
from ray_trainer.state import Stateful
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Commits checkpoints to a run's directory, keeps those worth keeping, and finds the one to go on from.

    Construction touches no storage. The manifests are the truth: they are read once, when the list is first
    needed, and remembered.

    Args:
        checkpoint_dir: the run's directory.
        keep_best_k: how many of the best stay, by `monitor` and `mode`.
        keep_last_n: how many of the newest stay; None keeps all.
        monitor: the metric that says which is best.
        mode: whether less or more of it is better.

    Raises:
        ConfigError: a number or the mode is out of range.
    """

    def __init__(
        self,
        checkpoint_dir: Storage | str | os.PathLike[str],
        keep_best_k: int = 3,
        keep_last_n: int | None = 5,
        monitor: str = "val_loss",
        mode: Mode = "min",
    ) -> None:
        self.storage = open_storage(checkpoint_dir)
        self.policy = RetentionPolicy(keep_last_n, keep_best_k, monitor, mode)
        self._catalog = Catalog(self.storage)
        self._background = BackgroundWriter()

    @property
    def checkpoint_dir(self) -> Path | str:
        """The run's directory; a URI if it is not on this machine."""
        return self._place(self.storage)

    def commit(self, state: Mapping[str, Any], rank_state: Mapping[str, Any], meta: CheckpointMeta) -> CheckpointRecord:
        """Write a checkpoint, whole or not at all, then delete those that need not be kept. Collective.

        Args:
            state: what is equal on all ranks, by part; rank 0's is written. ``model`` and ``optimizer`` have
                files of their own.
            rank_state: what this rank alone has; may be empty.
            meta: where in the run this is.

        Raises:
            CheckpointError: on all ranks, if it failed on any; earlier checkpoints are as they were.
        """
        commit = Commit(self.storage, lambda _: DirectWriter(), meta, self.policy)
        commit.begin(state, rank_state)
        return self.finish(commit)

    def begin(self, state: Mapping[str, Any], rank_state: Mapping[str, Any], meta: CheckpointMeta) -> Commit:
        """As `commit`, but only take the state; what is large is written while training goes on. Collective.

        One at a time: `finish` it, or `advance` until it is whole, before the next.
        """
        commit = Commit(self.storage, self._writer_for, meta, self.policy)
        commit.begin(state, rank_state)
        return commit

    def advance(self, commit: Commit) -> CheckpointRecord | None:
        """Go on with what `begin` began; the record once it is whole. Collective.

        Raises:
            CheckpointError: on all ranks, if it failed on any; earlier checkpoints are as they were.
        """
        if not commit.advance(self._catalog.readable_records):
            return None
        assert commit.record is not None  # it is whole
        self._catalog.add(commit.record, commit.deleted)
        return commit.record

    def finish(self, commit: Commit) -> CheckpointRecord:
        """Wait until what `begin` began is whole. Collective.

        Raises:
            CheckpointError: as `advance`.
        """
        while (record := self.advance(commit)) is None:
            pass
        return record

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Allocate memory for snapshots of a state whose larger parts these are, while training goes on."""
        size_bytes = sum(image.size_bytes for image in files_of_rank(state, {}).images)
        if not self._is_small(size_bytes):
            self._background.prepare(size_bytes)

    def close(self) -> None:
        """Free the memory of snapshots; one that is being written is given up."""
        self._background.close()

    def restore(
        self,
        which: str | os.PathLike[str] | None = "auto",
        share: Share | None = None,
        saved: Callable[[], Collection[str]] = tuple,
    ) -> LoadedCheckpoint | None:
        """Load a checkpoint after comparing the checksum of every file. Collective.

        In this run's directory, one that is not whole is renamed to ``<name>.broken`` with the reason in it,
        and the next is tried.

        Args:
            which: ``"auto"``: the newest, or None if this run has not saved yet. ``"newest"`` or ``"best"``:
                there must be one; best by `monitor`, the newest where nothing was monitored. The name, path
                or URI of a checkpoint: it must be whole. Another run's directory: its newest. None: None.
            share: which part of each sharded tensor this rank needs; None puts all of them together.
            saved: gives the names of the run's checkpoints that are known to have been whole once, the newest last;
                asked on rank 0, where something is missing.

        Raises:
            CheckpointNotFoundError: what was named is not there.
            CheckpointCorruptError: what was named is broken, or everything that was saved is broken or gone, which
                then stays as it is: never a start from scratch.
            CheckpointError: storage failed, or a later version of ray_trainer wrote it.
        """
        if which is None:
            return None
        text = os.fspath(which)
        loaded, rejected = restore_on_all_ranks(lambda: select(self.storage, text, self.policy, share, saved), share)
        is_own = loaded is None or loaded.record.uri == self.storage.child(loaded.record.name).uri
        self._catalog.forget([rejection.name for rejection in rejected] if is_own else [])
        return loaded

    def restore_up_to(self, step: int, share: Share | None = None) -> LoadedCheckpoint | None:
        """As `restore` of the newest, but of those up to a step; None if there is none. Collective."""

        def find() -> Selection:
            found = ((name, checkpoint_order(name)) for name in newest_first(self.storage))
            names = [name for name, order in found if order is not None and order.step <= step]
            broken: list[Rejection] = []
            selection = load_first_whole(self.storage, names, broken.append, share)
            for rejection in broken:
                set_aside(self.storage, rejection)
            return selection

        loaded, _ = restore_on_all_ranks(find, share)
        self._catalog.forget()
        return loaded

    def keep_for(self, step: int) -> None:
        """Keep, from now on, the newest checkpoint of those up to a step, because the run may go back to it."""
        self.policy = replace(self.policy, needed_step=step)

    def clean_leftovers(self, saved: Callable[[], Collection[str]] = tuple) -> list[str]:
        """Delete what saves that were never finished left behind; returns their names.

        Only the one writer of a run may call this. Ranks other than 0 do nothing.

        Args:
            saved: as in `restore`; those stay, even if they have lost their manifest.
        """
        if distributed.rank() > 0:
            return []
        places = {name: self.storage.child(name) for name in checkpoint_names(self.storage)}
        bare = [name for name, place in places.items() if not place.exists(MANIFEST)]
        known = saved() if bare else ()
        return [name for name in bare if not has_lost_manifest(places[name], known) and self._delete(name)]

    def newest_step(self) -> int:
        """Of what was finished on storage; -1 for nothing.

        Raises:
            OSError: storage cannot be read.
        """
        return newest_step(self.storage)

    def records(self) -> list[CheckpointRecord]:
        """The run's checkpoints, old to new."""
        return self._catalog.records()

    def forget(self) -> None:
        """Read the list from storage again when it is next needed: somebody else has changed it."""
        self._catalog.forget()

    def best_record(self) -> CheckpointRecord | None:
        """The best by `monitor`; None if no checkpoint has a finite value of it."""
        return self.policy.best(self.records())

    def get_best(self) -> Path | str | None:
        """Where the best checkpoint is, or the newest if nothing was monitored; None if there is none."""
        record = self.best_record() or next(iter(self.records()[-1:]), None)
        return None if record is None else self._place(self.storage.child(record.name))

    def list_checkpoints(self) -> list[CheckpointMetadata]:
        """The run's checkpoints, the latest epoch first."""
        return [CheckpointMetadata.of(record) for record in reversed(self.records())]

    def save(
        self,
        model: nn.Module,
        optimizer: Stateful | None,
        scheduler: Stateful | None,
        epoch: int,
        metrics: Mapping[str, Any],
        global_step: int | None = None,
        custom_state: Mapping[str, Any] | None = None,
    ) -> Path | str:
        """Commit a model, an optimizer and a scheduler, without a trainer. Collective.

        Args:
            model: saved under its own names, whatever it is wrapped in.
            optimizer: saved as its state dict, if there is one.
            scheduler: likewise.
            epoch: from 0.
            metrics: the monitored one must be among them.
            global_step: default ``epoch``.
            custom_state: anything plain, given back by `load`.

        Raises:
            ValueError: the monitored metric is missing.
            CheckpointError: as `commit`.
        """
        if self.policy.monitor not in metrics:
            raise ValueError(
                f"The monitored metric {self.policy.monitor!r} was not found in metrics {sorted(metrics)}."
            )
        state = direct.state_of(model, optimizer, scheduler, custom_state)
        meta = CheckpointMeta(epoch, epoch if global_step is None else global_step, metrics)
        record = self.commit(state, {}, meta)
        return self._place(self.storage.child(record.name))

    def load(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """A checkpoint as a dict of state dicts; the best by default. Touches nothing, random state included.

        Raises:
            CheckpointNotFoundError: there is none.
            CheckpointCorruptError: it is not whole.
        """
        chosen = path or self.get_best()
        if chosen is None:
            raise CheckpointNotFoundError(f"No checkpoints found in {self.storage.uri}")
        return direct.as_dict(load_named(resolve(self.storage, os.fspath(chosen))))

    def _writer_for(self, size_bytes: int) -> Writer:
        return DirectWriter() if self._is_small(size_bytes) else self._background

    def _is_small(self, size_bytes: int) -> bool:
        return self.storage.is_local and size_bytes < SMALL_BYTES

    def _delete(self, name: str) -> bool:
        try:
            discard(self.storage, name)
        except OSError as error:
            logger.warning("Checkpoint %s could not be deleted: %s", name, error)
            return False
        logger.debug("Deleted checkpoint %s", name)
        return True

    def _place(self, storage: Storage) -> Path | str:
        return storage.local_path() if storage.is_local else storage.uri
