"""Reading checkpoints, every byte checked: the first whole one of some, or one that was named."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_all_ranks, on_rank_zero
from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.layout import files_of_others, has_lost_manifest, read_manifest, read_rank_state, read_state
from ray_trainer.checkpoint.manifest import MANIFEST, Manifest
from ray_trainer.checkpoint.shards import Share
from ray_trainer.checkpoint.tiers import Tier
from ray_trainer.checkpoint.verifying import content_problem
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

UNFINISHED = f"{MANIFEST} is missing: the save was never finished"
_LOST_MANIFEST = f"{MANIFEST} is missing, although the save was finished"
#: What a user may do whose run has lost its checkpoints.
WAYS_ON = (
    "To go on, bring back the files of a checkpoint, as from a backup, and give the same command again. To start again "
    "on purpose, give the run another name or directory, or call Trainer.train with resume_from=None, which keeps what "
    "is left in previous_NN/."
)


@dataclass(frozen=True)
class Carried:
    """What a run that broke off knew beyond its state, for the run that goes on from it.

    Attributes:
        rows: metrics of the last steps, which a lost rank 0 may not have written; all of a step or none.
        saved_step: of the newest checkpoint that is whole; -1 if there was none.
        saved_at_s: time of training when the last checkpoint was begun.
        owes_save: a checkpoint was on its way, and is lost.
        story: how the ranks found together again, for the event that tells of it; plain.
    """

    rows: tuple[dict[str, Any], ...]
    saved_step: int
    saved_at_s: float
    owes_save: bool
    story: dict[str, Any] = field(default_factory=dict)


class Rejection(NamedTuple):
    """A checkpoint that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        state: what was equal on all ranks; of sharded tensors this rank's share.
        rank_state: what this rank alone had; None if the run that saved had fewer ranks.
        rejected: newer (or better) ones that were not whole, in the order they were tried.
        tier: where it came from.
        carried: what the process that it came from knew besides, where that is alive.
        asked_at: when a run asked for it; UNIX seconds.
        state_s: how long it took to find and read it.
    """

    state: dict[str, Any]
    rank_state: dict[str, Any] | None
    manifest: Manifest
    record: CheckpointRecord
    rejected: list[Rejection] = field(default_factory=list)
    tier: Tier = Tier.STORAGE
    carried: Carried | None = None
    asked_at: float = 0.0
    state_s: float = 0.0


class Selection(NamedTuple):
    """What rank 0 found.

    Attributes:
        place: where `loaded` is.
        loaded: None if no save was ever finished.
    """

    place: Storage | None
    loaded: LoadedCheckpoint | None
    rejected: list[Rejection]


def restore_on_all_ranks(
    select: Callable[[], Selection], share: Share | None = None
) -> tuple[LoadedCheckpoint | None, list[Rejection]]:
    """Let rank 0 find a checkpoint, and all ranks load that one, or their share of it. Collective.

    Returns:
        The checkpoint with this rank's own state, and what was rejected on the way to it.

    Raises:
        CheckpointError: on all ranks, if any of them can't load it.
    """
    loaded: LoadedCheckpoint | None = None

    def find() -> tuple[Storage | None, list[Rejection]]:
        nonlocal loaded
        place, loaded, rejected = select()
        return place, rejected

    def follow() -> None:
        nonlocal loaded
        if place is not None and loaded is None:
            loaded = _load_what_rank_zero_found(place, share)

    place, rejected = on_rank_zero(find)
    on_all_ranks(follow)
    return loaded and replace(loaded, rejected=rejected), rejected


def load(checkpoint: Storage, rank: int, share: Share | None = None) -> LoadedCheckpoint:
    """Read one checkpoint, checking the bytes that are used; of sharded tensors what a share says, or all.

    Raises:
        CheckpointCorruptError: a file is missing or altered.
        NewerFormatError: a later version wrote it.
        FileNotFoundError: it has no manifest.
    """
    manifest = read_manifest(checkpoint)
    name = checkpoint.path.rpartition("/")[2]
    return LoadedCheckpoint(
        state=read_state(checkpoint, manifest, share),
        rank_state=read_rank_state(checkpoint, manifest, rank),
        manifest=manifest,
        record=CheckpointRecord.of(name, checkpoint.uri, manifest),
    )


def load_whole(checkpoint: Storage, share: Share | None = None) -> LoadedCheckpoint:
    """As `load` on rank 0, checking the files of other ranks as well."""
    loaded = load(checkpoint, 0, share)
    for name in files_of_others(loaded.manifest, 0, share):
        if problem := content_problem(checkpoint, name, loaded.manifest.files[name]):
            raise CheckpointCorruptError(problem)
    return loaded


def load_first_whole(
    run: Storage,
    names: Iterable[str],
    on_broken: Callable[[Rejection], None],
    share: Share | None = None,
    saved: Callable[[], Collection[str]] = tuple,
) -> Selection:
    """Try checkpoints in turn and load the first that is whole.

    One that storage can't deliver at the moment is passed over, but not called broken.

    Args:
        run: the run's directory.
        names: the best candidate first.
        on_broken: told of each whose files are missing or altered.
        share: as for `load`.
        saved: as for `select`; where there are any, one must be found. Asked only where something is missing.

    Raises:
        NewerFormatError: a later version wrote the next candidate; an older one is no substitute for it.
        CheckpointCorruptError: checkpoints were written, and none of them can be used.
        CheckpointError: none of them can be used, and some can't be read at the moment.
    """
    rejected: list[Rejection] = []
    is_lost = may_come_back = False
    for name in names:
        place = run.child(name)
        try:
            return Selection(place, load_whole(place, share), rejected)
        except CheckpointCorruptError as error:
            rejected.append(Rejection(name, str(error)))
            on_broken(rejected[-1])
            is_lost = True
        except FileNotFoundError:
            if has_lost_manifest(place, saved()):
                rejected.append(Rejection(name, _LOST_MANIFEST))
                on_broken(rejected[-1])
            else:
                rejected.append(Rejection(name, UNFINISHED))
        except OSError as error:
            rejected.append(Rejection(name, f"it could not be read: {error}"))
            may_come_back = True
        logger.warning("Checkpoint %s is not used: %s", *rejected[-1])
    if is_lost or may_come_back or saved():
        kind = CheckpointError if may_come_back else CheckpointCorruptError
        raise kind(_nothing_left(run, rejected, saved()))
    return Selection(None, None, rejected)


def load_named(checkpoint: Storage, share: Share | None = None) -> LoadedCheckpoint:
    """Load the checkpoint that the user named, and no other.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        CheckpointCorruptError: it is not whole.
    """
    if not checkpoint.exists():
        raise CheckpointNotFoundError(f"Checkpoint not found: {checkpoint.uri}")
    try:
        return load_whole(checkpoint, share)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{checkpoint.uri} can't be used: {UNFINISHED}.") from error
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{checkpoint.uri} can't be used: {error}. Name another one, or the run for its newest."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{checkpoint.uri} could not be read: {error}") from error


def _load_what_rank_zero_found(place: Storage, share: Share | None) -> LoadedCheckpoint:
    try:
        return load(place, distributed.rank(), share)
    except (OSError, CheckpointCorruptError) as error:
        raise CheckpointError(
            f"{place.uri} is whole for rank 0, but not here: {error}. Is it the same storage on every node?"
        ) from error


def _nothing_left(run: Storage, rejected: Sequence[Rejection], saved: Collection[str]) -> str:
    reasons = [f"  {name}: {reason}" for name, reason in rejected]
    newest = list(saved)[-1] if saved else None
    if newest is not None and newest not in {rejection.name for rejection in rejected}:
        reasons.insert(0, f"  {newest}: it was the last that was saved, and is gone")
    return (
        f"None of the checkpoints that were saved in {run.uri} can be used:\n" + "\n".join(reasons) + "\n"
        f"To start from scratch would hide that loss, so nothing was done; no file was changed. {WAYS_ON}"
    )
