"""Choosing the checkpoint that a run goes on from, and setting aside what can't be that one."""

import logging
from collections.abc import Callable, Collection
from functools import cache

from ray_trainer.checkpoint.catalog import CheckpointRecord, checkpoint_names, is_checkpoint, resolve
from ray_trainer.checkpoint.layout import read_manifest
from ray_trainer.checkpoint.lineage import STRAY, Lineage
from ray_trainer.checkpoint.restore import WAYS_ON, Rejection, Selection, load_first_whole, load_named
from ray_trainer.checkpoint.retention import RetentionPolicy
from ray_trainer.checkpoint.shards import Share
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

_BROKEN = ".broken"
_STRAY = ".stray"


def select(
    run: Storage,
    which: str,
    policy: RetentionPolicy,
    share: Share | None = None,
    saved: Callable[[], Collection[str]] = tuple,
) -> Selection:
    """Find and load what `CheckpointManager.restore` was asked for. Broken ones of the run are set aside.

    Args:
        run: the run's directory.
        which: see there.
        policy: says which is best.
        share: as for `load`.
        saved: gives the names of those of the run that are known to have been whole once, the newest last.

    Raises:
        CheckpointError: see there.
    """
    if which in ("auto", "newest", "best"):
        names = _best_first(run, policy) if which == "best" else newest_first(run)
        selection = _select_own(run, names, share, saved)
        if selection.loaded is None and which != "auto":
            raise CheckpointNotFoundError(f"No checkpoints found in {run.uri}")
        return selection
    place = resolve(run, which)
    if place.uri == run.uri:
        return select(run, "newest", policy, share, saved)
    if is_checkpoint(place):
        return Selection(place, load_named(place, share), [])
    selection = load_first_whole(place, newest_first(place), on_broken=lambda rejection: None, share=share)
    if selection.loaded is None:
        raise CheckpointNotFoundError(f"No checkpoints found in {place.uri}")
    return selection


def set_aside(run: Storage, rejection: Rejection, suffix: str = _BROKEN) -> None:
    """Rename a broken checkpoint, so that it is neither used nor counted, and leave the reason in it.

    Where that is not possible (read-only storage), it stays where it is.
    """
    taken = set(run.list())
    target, copy = rejection.name + suffix, 1
    while target in taken:
        copy += 1
        target = f"{rejection.name}{suffix}{copy}"
    try:
        run.move(rejection.name, target)
        run.child(target).write("reason.txt", f"{rejection.reason}\n".encode())
    except OSError as error:
        logger.warning("The broken checkpoint %s could not be set aside: %s", rejection.name, error)


def newest_first(run: Storage) -> list[str]:
    """All checkpoint directories, finished or not, new to old."""
    return checkpoint_names(run)[::-1]


def _select_own(run: Storage, names: list[str], share: Share | None, saved: Callable[[], Collection[str]]) -> Selection:
    """Nothing is renamed before one is found, so that files can be brought back to where they were."""
    strays, broken = _strays(run, names), list[Rejection]()
    present, stray_names = run.list(), {stray.name for stray in strays}

    @cache
    def known() -> list[str]:
        return [name for name in saved() if name not in stray_names and f"{name}{_STRAY}" not in present]

    selection = load_first_whole(
        run,
        [name for name in names if name not in stray_names],
        on_broken=broken.append,
        share=share,
        saved=known,
    )
    aside = [name for name in present if name.startswith("checkpoint_") and _BROKEN in name]
    if selection.loaded is None and aside:  # this run had begun: from scratch would hide the loss
        raise CheckpointCorruptError(
            f"{run.uri} holds no whole checkpoint, but broken ones: {', '.join(aside)}; the reason is in "
            f"each. Nothing was changed. {WAYS_ON}"
        )
    for stray in strays:
        logger.warning("Checkpoint %s is not used: %s", *stray)
        set_aside(run, stray, suffix=_STRAY)
    for rejection in broken:
        set_aside(run, rejection)
    return selection._replace(rejected=strays + selection.rejected)


def _strays(run: Storage, names: list[str]) -> list[Rejection]:
    """What an earlier owner of the run wrote after it had lost it."""
    lineage = Lineage.of(run)
    return [Rejection(name, STRAY) for name in names if lineage.is_stray_on(run, name)]


def _best_first(run: Storage, policy: RetentionPolicy) -> list[str]:
    """Those with the monitored metric, best first, then the others, new to old."""
    names = newest_first(run)
    best = policy.best_first(record for name in names if (record := _record(run.child(name), name)))
    ranked = [record.name for record in best]
    return ranked + [name for name in names if name not in ranked]


def _record(checkpoint: Storage, name: str) -> CheckpointRecord | None:
    try:
        return CheckpointRecord.of(name, checkpoint.uri, read_manifest(checkpoint))
    except (OSError, CheckpointError):  # it is judged when its turn comes
        return None
