"""The model's weights alone, without a trainer."""

import logging
import os
from pathlib import Path
from typing import Literal, cast

import torch

from ray_trainer.checkpoint.catalog import checkpoint_names, is_checkpoint, list_checkpoints, open_storage
from ray_trainer.checkpoint.layout import read_manifest, read_model
from ray_trainer.checkpoint.manifest import MANIFEST
from ray_trainer.checkpoint.retention import Mode, RetentionPolicy
from ray_trainer.checkpoint.tensors import STORABLE_DTYPES, tensor_image
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

Which = Literal["best", "newest"]


def load_weights(location: Storage | str | os.PathLike[str], which: Which = "best") -> dict[str, torch.Tensor]:
    """The model's tensors, under all their names, from files whose checksums were compared.

    Args:
        location: a checkpoint, or a run.
        which: of a run; best by what the run monitors, and the newest where nothing was monitored.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointCorruptError: it is not whole; no other is taken in its place.
    """
    return _read_weights(_choose(open_storage(location), which))


def export_weights(
    location: Storage | str | os.PathLike[str],
    output: str | os.PathLike[str],
    which: Which = "best",
) -> None:
    """Write the model's tensors to one safetensors file, whole or not at all.

    It has an entry for every name, also where two share their values, so that it loads strictly.

    Args:
        location: a checkpoint, or a run.
        output: the file, a local path or a URI.
        which: as for `load_weights`.

    Raises:
        CheckpointError: as `load_weights`, or the model has tensors of a type that safetensors lacks.
    """
    checkpoint = _choose(open_storage(location), which)
    tensors = _read_weights(checkpoint)
    if foreign := [name for name, tensor in tensors.items() if tensor.dtype not in STORABLE_DTYPES]:
        raise CheckpointError(
            f"{', '.join(foreign)}: safetensors has no {tensors[foreign[0]].dtype}. "
            f"Convert the model before it is saved, or read {checkpoint.uri} with load_weights()."
        )
    directory, name = _split(os.fspath(output))
    Storage.open(directory).write_chunks(name, tensor_image(name, tensors).chunks())


def _choose(place: Storage, which: Which) -> Storage:
    if which not in ("best", "newest"):
        raise ValueError(f"which ({which!r}) must be 'best' or 'newest'.")
    if is_checkpoint(place):
        return place
    finished = [name for name in checkpoint_names(place) if place.child(name).exists(MANIFEST)]
    records = list_checkpoints(place)
    if not finished:
        raise CheckpointNotFoundError(f"No checkpoints found in {place.uri}")
    if which == "newest" or not records:
        return place.child(finished[-1])  # whole or not: no other is taken in its place
    for name in finished:
        if name not in {record.name for record in records}:
            logger.warning("%s is not whole and is passed over.", place.child(name).uri)
    newest = records[-1]
    policy = RetentionPolicy(None, 1, newest.monitor, cast(Mode, newest.mode))
    return place.child((policy.best(records) or newest).name)


def _read_weights(checkpoint: Storage) -> dict[str, torch.Tensor]:
    if not checkpoint.exists():
        raise CheckpointNotFoundError(f"Checkpoint not found: {checkpoint.uri}")
    try:
        return read_model(checkpoint, read_manifest(checkpoint))
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{checkpoint.uri} can't be used: {MANIFEST} is missing.") from error
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(f"{checkpoint.uri} can't be used: {error}") from error


def _split(output: str) -> tuple[str, str]:
    if "://" in output:
        directory, _, name = output.rpartition("/")
        return directory, name
    path = Path(output)
    return str(path.parent), path.name
