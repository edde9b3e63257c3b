"""What a run takes over from its checkpoint: what may differ from it, what is told, and what is refused."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ray_trainer import distributed
from ray_trainer.checkpoint import LoadedCheckpoint, Manifest
from ray_trainer.checkpoint.manifest import library_versions
from ray_trainer.config import TrainingConfig
from ray_trainer.data.description import DataDescription, is_of_content
from ray_trainer.data.fingerprint import fingerprint
from ray_trainer.data.source import BatchSource
from ray_trainer.errors import DataError, StateMismatchError
from ray_trainer.state import Progress

logger = logging.getLogger(__name__)

#: Settings that say where and how often a run is looked at, not what it computes; the data has a fingerprint.
_WITHOUT_EFFECT = {
    "checkpoint_dir", "save_every_n_epochs", "save_every_n_steps", "save_every_minutes", "save_interval",
    "save_budget", "overlapping_saves", "max_failed_saves", "init_from", "init_partial", "keep_last_n",
    "keep_best_k", "log_every_n_steps", "tensorboard", "run_name", "notes", "max_time", "num_loader_workers",
    "on_data_change", "on_bad_data", "max_bad_ratio", "compare_replicas_every_n_steps",
}  # fmt: skip
#: Settings that decide which samples a step takes: another value is another run.
_OF_THE_ORDER = ("random_seed", "shuffle", "drop_last", "limit_train_batches", "validation_split")


@dataclass(frozen=True)
class DataChange:
    """Data that is not what it was when the checkpoint was written.

    Attributes:
        split: ``train`` or ``val``.
        differs: what is different, in parts of a sentence.
        fingerprint: of the data as it is now.
        action: ``restart_epoch`` or ``continue``.
    """

    split: str
    differs: list[str]
    fingerprint: str
    action: str

    @property
    def restarts_epoch(self) -> bool:
        """Whether the epoch in progress starts again."""
        return self.action == "restart_epoch"


def saved_progress(saved: LoadedCheckpoint | None) -> Progress:
    """How far the run was, before any part of it is restored."""
    state: Mapping[str, Any] = saved.state.get("progress", {}) if saved else {}
    return Progress(**{item.name: state[item.name] for item in fields(Progress) if item.name in state})


def data_record(train: BatchSource, val: BatchSource | None) -> dict[str, Any]:
    """What a manifest says of the data, by split.

    Validation data is only told of, never refused, so nothing is read for it but what is in memory.
    """
    record = {"train": {"fingerprint": train.fingerprint, **DataDescription.of(train).to_dict()}}
    if val is not None and getattr(val, "is_in_memory", False):
        record["val"] = {"fingerprint": val.fingerprint, **DataDescription.of(val).to_dict()}
    elif val is not None:
        length = DataDescription(type(val).__name__, val.num_samples).to_dict()
        record["val"] = {"fingerprint": fingerprint(length), **length}
    return record


def require_same_data(record: Mapping[str, Any]) -> None:
    """Let all ranks compare what they read. Collective.

    Raises:
        DataError: on all ranks, if the data of one is not that of the others.
    """
    prints = distributed.gather_objects({split: data["fingerprint"] for split, data in record.items()})
    others = [rank for rank, found in enumerate(prints) if found != prints[0]]
    if others:
        error = DataError(
            f"The ranks do not read the same data: that of rank {others[0]} differs from that of rank 0. Let all "
            "of them open the same files, or build the data once and pass it on."
        )
        error.on_all_ranks = True
        raise error


def accept_changes(saved: Manifest | None, config: TrainingConfig, record: Mapping[str, Any]) -> list[DataChange]:
    """Compare a run with its checkpoint: what cannot be continued is refused, other differences are told.

    Args:
        saved: the checkpoint's; None for a fresh start.
        config: of the run as it goes on.
        record: of its data, from `data_record`.

    Returns:
        What of the data has changed and is accepted.

    Raises:
        StateMismatchError: settings that decide the order of samples are not what they were, or the data is not
            and ``on_data_change`` does not allow it.
    """
    if saved is None:
        return []
    now = config.to_dict()
    changed = {
        name: (old, now[name])
        for name, old in saved.config.items()
        if name in now and _plain(old) != _plain(now[name]) and name not in _WITHOUT_EFFECT
    }
    data_changes = list(_data_changes(saved, config, record))
    problems = list(_problems(changed, data_changes))
    if problems:
        raise StateMismatchError(
            "The run cannot be continued, because its steps would not be the same: " + "; ".join(problems) + ". "
            "Bring back what was there, or start a new run under another name or directory."
            + _way_on(data_changes, is_all=len(problems) == 1)
        )
    for name, (old, new) in changed.items():
        logger.warning("%s was %r when the checkpoint was written and is %r now.", name, old, new)
    for change in data_changes:
        logger.warning("The %s data has changed (%s): %s.", change.split, change.action, "; ".join(change.differs))
    surroundings = list(_changed_surroundings(saved))
    if surroundings and distributed.rank() == 0:
        logger.warning("The checkpoint was computed with %s: bits may differ.", ", ".join(surroundings))
    return data_changes


def _changed_surroundings(saved: Manifest) -> Iterator[str]:
    """What bits depend on beside data and settings, where it is not what it was."""
    now = library_versions()
    for name, before in saved.versions.items():
        if now.get(name, before) != before:
            yield f"{name} {before} (now {now[name]})"
    if saved.num_threads != torch.get_num_threads():
        yield f"{saved.num_threads} threads (now {torch.get_num_threads()})"


def _data_changes(saved: Manifest, config: TrainingConfig, record: Mapping[str, Any]) -> Iterator[DataChange]:
    before = {name: dict(part) for name, part in saved.data.items()}
    before.setdefault("train", {})["fingerprint"] = saved.data_fingerprint
    for split, old in before.items():
        new = record.get(split)
        if new is None or not old["fingerprint"] or old["fingerprint"] == new["fingerprint"]:
            continue
        differs = _differences(old, new)
        if config.validation_split and "val" in record:
            differs.append("validation_split draws its share anew, so samples may be validated that were trained on")
        action = config.on_data_change if split == "train" else "continue"
        yield DataChange(split, differs, new["fingerprint"], action)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if "kind" not in old:
        return ["the checkpoint does not say what it was"]
    return DataDescription.from_dict(old).differences(DataDescription.from_dict(new))


def _problems(changed: Mapping[str, tuple[Any, Any]], data_changes: list[DataChange]) -> Iterator[str]:
    for name in _OF_THE_ORDER:
        if name in changed:
            yield f"{name} was {changed[name][0]!r} and is {changed[name][1]!r}"
    if "optimizer" in changed:
        yield "the optimizer was {!r} and is {!r}, which cannot take over its state".format(*changed["optimizer"])
    for change in data_changes:
        if change.action == "refuse":
            yield (f"the training data is not the data that the run was started with ({'; '.join(change.differs)})")


def _way_on(data_changes: list[DataChange], is_all: bool) -> str:
    """The advice where changed data is the one thing in the way."""
    if not is_all or not any(change.action == "refuse" for change in data_changes):
        return ""
    cause = ""
    if all(is_of_content(difference) for change in data_changes for difference in change.differs):
        cause = " If nobody changed it, what makes it draws at random: seed that, so that each start gives the same."
    return cause + (
        " To go on with the data as it is now, set on_data_change to 'restart_epoch' (the epoch in progress starts "
        "again) or 'continue' (it goes on at the same place)."
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
