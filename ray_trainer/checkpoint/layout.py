"""The files of one checkpoint: their names, and what goes into which.

================================  ===============================================================
``model.safetensors``             the state's ``model``, under the model's own names
``optimizer.safetensors``         tensors of its ``optimizer``, or rank 0's stripe of them, see `stripes`
``optimizer.stripe00001.…``       the stripe that rank 1 wrote; likewise for other ranks
``trainer.safetensors``           tensors of its other parts
``trainer.json``                  everything that is not a tensor, and where each tensor is
``rank00000.*``                   what rank 0 alone has, in the same two forms; likewise for other ranks
``model.shard00000.safetensors``  what rank 0 has of sharded tensors, see `shards`; likewise ``optimizer``
``shard00000.json``               where these pieces belong
``manifest.json``                 what these files are, written last
================================  ===============================================================
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from ray_trainer.checkpoint.decoding import decode
from ray_trainer.checkpoint.encoding import SHARDED_FILES, Encoded, Json, StatePath, encode
from ray_trainer.checkpoint.images import FileImage
from ray_trainer.checkpoint.manifest import MANIFEST, Manifest
from ray_trainer.checkpoint.shards import Pieces, ShardReader, Share, is_sharded, pieces_and_table
from ray_trainer.checkpoint.stripes import ALONE, Stripe, digest, divide, size_bytes
from ray_trainer.checkpoint.tensors import read_tensors, tensor_image
from ray_trainer.checkpoint.verifying import checked
from ray_trainer.errors import CheckpointCorruptError
from ray_trainer.storage import Storage, sealing

_NAME = re.compile(r"checkpoint_epoch(\d{4,})_step(\d{8,})(?:_(\d+))?")
_RANK_FILE = re.compile(r"rank\d{5,}\.(json|safetensors)")
_SHARD_FILE = re.compile(r"(?:(?:model|optimizer)\.)?shard(\d{5,})\.(json|safetensors)")
_STRIPE_FILE = re.compile(r"(\w+)(?:\.stripe\d{5,})?\.safetensors")
_SHARED = "trainer"
_STRIPED = "optimizer"
_OWN_FILE = SHARDED_FILES  # encoded first, so that what others share with them is in these files


class StateFiles(NamedTuple):
    """What one rank writes of the state that is equal on all.

    Attributes:
        images: its files.
        division: tells whether all ranks have divided the state in the same way.
    """

    images: list[FileImage]
    division: str


class CheckpointOrder(NamedTuple):
    """Sorts checkpoints of a run from old to new; `copy` tells those of the same step apart."""

    step: int
    epoch: int
    copy: int


def checkpoint_name(epoch: int, step: int, copy: int = 1) -> str:
    """The name of a checkpoint's directory."""
    return f"checkpoint_epoch{epoch:04d}_step{step:08d}" + (f"_{copy}" if copy > 1 else "")


def checkpoint_order(name: str) -> CheckpointOrder | None:
    """Where a directory of that name stands among the run's checkpoints; None if it is none."""
    match = _NAME.fullmatch(name)
    return match and CheckpointOrder(int(match[2]), int(match[1]), int(match[3] or 1))


def pack_state(state: Mapping[str, Any], stripe: Stripe = ALONE) -> StateFiles:
    """The files of what is equal on all ranks, as far as one of them writes it.

    Raises:
        CheckpointError: something in it can't be stored; names its path.
    """
    names = sorted(state, key=lambda part: part not in _OWN_FILE)
    encoded = encode({name: state[name] for name in names}, file_of=_file_of)
    others = sum(size_bytes(tensors) for file, tensors in encoded.tensors.items() if file != _STRIPED)
    parts = divide(encoded.tensors.pop(_STRIPED, {}), others, stripe.world_size)
    mine = parts[stripe.rank]
    if stripe.rank:
        images = [tensor_image(f"{_STRIPED}.stripe{stripe.rank:05d}.safetensors", mine)] if mine else []
    else:
        encoded.tensors.update({_STRIPED: mine} if mine else {})
        images = _images(encoded, _SHARED)
    return StateFiles(images, digest(parts) if stripe.world_size > 1 else "")


def pack_rank_state(rank_state: Mapping[str, Any], rank: int) -> list[FileImage]:
    """The files of what one rank alone has; none if it has nothing."""
    if not rank_state:
        return []
    stem = _rank_stem(rank)
    return _images(encode(dict(rank_state), (stem,), file_of=lambda path: (stem, path[1:])), stem)


def pack_shards(state: Mapping[str, Any], rank: int) -> list[FileImage]:
    """The files of what one rank has of sharded tensors; none where nothing is sharded.

    Raises:
        CheckpointError: something in model or optimizer can't be stored; names its path.
    """
    model = state.get("model")
    if not isinstance(model, Mapping) or not any(is_sharded(tensor) for tensor in model.values()):
        return []
    encoded = encode({part: state[part] for part in _OWN_FILE if part in state}, file_of=_file_of)
    pieces, table = pieces_and_table(encoded.shards)
    images = [tensor_image(_shard_file(file, rank), tensors) for file, tensors in pieces.items()]
    return [*images, FileImage(f"shard{rank:05d}.json", (json.dumps(table, separators=(",", ":")).encode(),))]


def read_manifest(checkpoint: Storage) -> Manifest:
    """The manifest of a checkpoint; ``FileNotFoundError`` where the save was never finished."""
    try:
        return Manifest.from_bytes(checkpoint.read(MANIFEST))
    except IsADirectoryError as error:
        raise CheckpointCorruptError(f"{MANIFEST} is broken: it is a directory") from error


def read_state(checkpoint: Storage, manifest: Manifest, share: Share | None = None) -> dict[str, Any]:
    """What is equal on all ranks, from bytes that were checked.

    Args:
        checkpoint: where it is.
        manifest: what it is.
        share: which part of each sharded tensor is needed; None puts all of them together.

    Raises:
        CheckpointCorruptError: a file is missing or altered.
    """
    names = [name for name in manifest.files if not _RANK_FILE.fullmatch(name) and not _SHARD_FILE.fullmatch(name)]
    return _read(checkpoint, manifest, names, _SHARED, _read_shards(checkpoint, manifest, _OWN_FILE, share))


def files_of_others(manifest: Manifest, rank: int, share: Share | None) -> list[str]:
    """The files that `read_state` and `read_rank_state` of a rank may not have looked at."""
    skipped = [name for name in manifest.files if _RANK_FILE.fullmatch(name) and not name.startswith(_rank_stem(rank))]
    pieces = [name for name in manifest.files if _SHARD_FILE.fullmatch(name) and not name.endswith(".json")]
    return skipped + (pieces if share else [])


def read_rank_state(checkpoint: Storage, manifest: Manifest, rank: int) -> dict[str, Any] | None:
    """What one rank alone had; None if there was no such rank."""
    stem = _rank_stem(rank)
    if f"{stem}.json" not in manifest.files:
        return {} if rank < manifest.world_size else None
    names = [name for name in manifest.files if name.startswith(f"{stem}.")]
    return _read(checkpoint, manifest, names, stem)


def read_model(checkpoint: Storage, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The model's tensors alone, all names of shared ones included."""
    tensors: Pieces = {}
    if "model.safetensors" in manifest.files:
        tensors["model"] = _read_tensors(checkpoint, manifest, "model.safetensors")
    for file, whole in _read_shards(checkpoint, manifest, ("model",), None).items():
        tensors.setdefault(file, {}).update(whole)
    tree = _read_tree(checkpoint, manifest, _SHARED).get("model", {})
    model = decode(tree, tensors)
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


def discard(run: Storage, name: str) -> None:
    """Delete a checkpoint, its manifest first."""
    sealing.discard(run, name, MANIFEST)


def has_lost_manifest(checkpoint: Storage, saved: Collection[str]) -> bool:
    """Whether a directory without manifest is a checkpoint all the same, and not what a save or `discard` left.

    Args:
        checkpoint: where there is no manifest.
        saved: the names of those of its run that are known to have been whole once.
    """
    if checkpoint.path.rpartition("/")[2] not in saved:
        return False
    files = checkpoint.list()
    return bool(files) and sealing.OBSOLETE not in files


def _file_of(path: StatePath) -> tuple[str, StatePath]:
    return (path[0], path[1:]) if path[0] in _OWN_FILE else (_SHARED, path)


def _rank_stem(rank: int) -> str:
    return f"rank{rank:05d}"


def _images(encoded: Encoded, stem: str) -> list[FileImage]:
    images = [tensor_image(f"{file}.safetensors", tensors) for file, tensors in encoded.tensors.items()]
    text = json.dumps(encoded.tree, separators=(",", ":"), allow_nan=False).encode()
    return [*images, FileImage(f"{stem}.json", (text,))]


def _shard_file(file: str, rank: int) -> str:
    return f"{file}.shard{rank:05d}.safetensors"


def _read_shards(checkpoint: Storage, manifest: Manifest, files: tuple[str, ...], share: Share | None) -> Pieces:
    """Sharded tensors, or the needed parts of them; pieces that hold none of it are not read."""
    tables = {
        int(match[1]): _read_tree(checkpoint, manifest, name.removesuffix(".json"))
        for name in manifest.files
        if (match := _SHARD_FILE.fullmatch(name)) and match[2] == "json"
    }
    if not tables:
        return {}
    reader = ShardReader(tables, files, share)
    for rank, file in reader.files:
        reader.take(rank, file, _read_tensors(checkpoint, manifest, _shard_file(file, rank)))
    return reader.tensors()


def _read(
    checkpoint: Storage, manifest: Manifest, names: list[str], stem: str, shards: Pieces | None = None
) -> dict[str, Any]:
    tree = _read_tree(checkpoint, manifest, stem)
    tensors: Pieces = {}
    for name in names:
        if match := _STRIPE_FILE.fullmatch(name):
            tensors.setdefault(match[1], {}).update(_read_tensors(checkpoint, manifest, name))
    for file, parts in (shards or {}).items():
        tensors.setdefault(file, {}).update(parts)
    state = decode(tree, tensors)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{stem}.json holds no state.")
    return state


def _read_tensors(checkpoint: Storage, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    if name not in manifest.files:
        raise CheckpointCorruptError(f"{name} is missing")
    entry = manifest.files[name]
    with checked(checkpoint, name, entry) as blocks:
        return read_tensors(blocks, entry.size, name)


def _read_tree(checkpoint: Storage, manifest: Manifest, stem: str) -> dict[str, Json]:
    name = f"{stem}.json"
    if name not in manifest.files:
        raise CheckpointCorruptError(f"{name} is missing")
    with checked(checkpoint, name, manifest.files[name]) as blocks:
        text = b"".join(blocks)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointCorruptError(f"{name} holds no state")
    return tree
