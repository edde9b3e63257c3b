"""The state of a process that is still there when another rank is lost: the cheapest source to go on from.

It has the files of a checkpoint, as a snapshot in memory has them, and is read by the same code. So a run that goes
on from it is a run that was resumed.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_all_ranks
from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.commit import draft
from ray_trainer.checkpoint.images import copy_in, lay_out
from ray_trainer.checkpoint.layout import pack_state
from ray_trainer.checkpoint.manager import CheckpointManager
from ray_trainer.checkpoint.manifest import CheckpointMeta
from ray_trainer.checkpoint.memory import load_held, with_checksums
from ray_trainer.checkpoint.restore import Carried, LoadedCheckpoint
from ray_trainer.checkpoint.tiers import Tier
from ray_trainer.errors import CheckpointError
from ray_trainer.storage.snapshots import KeptState, ProcessMemory, SnapshotPart

logger = logging.getLogger(__name__)


class SurvivorTier:
    """What this process knows of a run that broke, and what the others do.

    Args:
        memory: of this process.
    """

    def __init__(self, memory: ProcessMemory) -> None:
        self._memory = memory

    def keep(
        self,
        state: Mapping[str, Any],
        own: dict[str, Any],
        meta: CheckpointMeta,
        carried: Carried,
        manager: CheckpointManager,
    ) -> None:
        """Copy the state of the last completed step: the run is broken, and its parts will go.

        Args:
            state: equal on all ranks but for what is this rank's own.
            own: what this rank alone has.
            meta: where in the run this is.
            carried: what is known beside the state.
            manager: of the run's checkpoints.
        """
        try:
            images = pack_state(state).images
        except CheckpointError as error:
            logger.warning("The state of step %d can't be kept: %s", meta.step, error)
            return
        places, size_bytes = lay_out(images)
        memory = torch.empty(size_bytes, dtype=torch.uint8)
        copy_in(images, places, memory)
        content = memory.numpy()
        header = draft(meta, manager.policy, manager.storage.fence.epoch).to_bytes()
        files = with_checksums(content, places)
        part = SnapshotPart((meta.attempt, meta.step), distributed.rank(), 1, header, files)
        self._memory.kept = KeptState(part, content, asdict(carried), own)

    def share(self) -> KeptState | None:
        """Give all ranks the state of the one that has completed the most steps; None if none has any. Collective.

        Until `release`, every rank keeps what it was given: the one that had it may be the next to be lost.
        """
        held = distributed.gather_objects(None if self._memory.kept is None else self._memory.kept.part.origin)
        steps = [-1 if origin is None else origin[0][1] for origin in held]
        if max(steps) < 0:
            return None
        if any(origin != held[0] for origin in held):  # else it is shared already
            source = steps.index(max(steps))
            self._receive(source, steps[distributed.rank()] == max(steps))
            self._memory.story["shared_at"] = time.time()
        return self._memory.kept

    def restore(self) -> LoadedCheckpoint | None:
        """`share` the state, and load it; None if no rank has any, or it is not what it was. Collective."""
        kept = self.share()
        if kept is None:
            return None
        loaded: LoadedCheckpoint | None = None

        def load() -> None:
            nonlocal loaded
            loaded = load_held(_Content(kept.content), [kept.part])

        try:
            on_all_ranks(load)
        except CheckpointError as error:
            self._memory.kept = None
            logger.warning("The state of rank %d can't be used: %s", kept.part.rank, error)
            return None
        assert loaded is not None  # on_all_ranks would have raised
        story = _story(distributed.gather_objects(self._memory.story))
        name = f"step {kept.part.key[1]} of the worker with rank {kept.part.rank}"
        return replace(
            loaded,
            rank_state=kept.own,
            record=CheckpointRecord.of(name, f"memory:{name}", loaded.manifest),
            tier=Tier.SURVIVOR,
            carried=Carried(**{**kept.carried, "story": story}),
        )

    def release(self) -> None:
        """Forget the state: it is in use again, or obsolete."""
        self._memory.kept = None
        self._memory.story = {}

    def _receive(self, source: int, is_up_to_date: bool) -> None:
        """Keep what the source keeps; a rank at the same step has still what is its own. Collective."""
        mine = self._memory.kept
        is_source = distributed.rank() == source
        story = self._memory.story
        header = None
        if mine is not None and is_source:
            header = (mine.part, mine.carried, len(mine.content), story.get("noticed_at", math.inf))
        shared = distributed.broadcast_object(header, source)
        assert shared is not None  # the source has it
        part, carried, size_bytes, noticed_at = shared
        content = mine.content if mine is not None and is_source else np.empty(size_bytes, dtype=np.uint8)
        distributed.broadcast_bytes(torch.from_numpy(content), source)
        own = mine.own if mine is not None and is_up_to_date else None
        self._memory.kept = KeptState(part, content, carried, own)
        if noticed_at < story.get("noticed_at", math.inf):
            story["noticed_at"] = noticed_at  # the source may be lost before it tells


class _Content:
    """The bytes of the only part of a snapshot."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self._content = content

    def content(self, part: SnapshotPart) -> NDArray[np.uint8]:
        """See `memory.Contents`."""
        return self._content


def _story(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """When the first rank noticed the loss and what took how long; the last rank counts in each phase."""
    noticed = min((story["noticed_at"] for story in of_ranks if story.get("noticed_at")), default=None)
    joined, formed, shared = (
        max((story[name] for story in of_ranks if name in story), default=None)
        for name in ("joined_at", "formed_at", "shared_at")
    )
    told: dict[str, Any] = {"generation": max((story.get("generation", 0) for story in of_ranks), default=0)}
    told["replaced"] = [rank for rank, story in enumerate(of_ranks) if story.get("is_new")]
    told["by_spares"] = [rank for rank, story in enumerate(of_ranks) if story.get("is_spare")]
    if noticed is not None and joined is not None and formed is not None:
        told |= {"noticed_at": noticed, "waited_s": joined - noticed, "group_s": formed - joined}
    return told | {"state_s": 0.0 if shared is None or formed is None else shared - formed}
