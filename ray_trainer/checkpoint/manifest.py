"""The manifest: what a checkpoint is, and the size and checksum of each of its files.

It is written last, so where it is, everything is. Its last field is a checksum of its own bytes; that and
``format_version`` stay what they are in later formats, so that an old version can tell newer from broken.
"""

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import xxhash

from ray_trainer.checkpoint.decoding import decode
from ray_trainer.checkpoint.encoding import Json, encode_plain
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, NewerFormatError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_NO_CHECKSUM = "0" * 32


class FileEntry(NamedTuple):
    """What a file has to be."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class CheckpointMeta:
    """What the training loop knows about the state that it hands over.

    Attributes:
        epoch: the epoch in progress, or just closed, from 0.
        step: completed optimizer steps of the run.
        metrics: numbers; the monitored one decides which checkpoint is best. NaN is allowed.
        global_batch_size: samples a step.
        config: the training configuration, plain.
        data_fingerprint: of the dataset and its order.
        attempt: which start of the run this is.
        data: what is told of the data, by split, to say what differs; plain.
    """

    epoch: int
    step: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    global_batch_size: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    data_fingerprint: str = ""
    attempt: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest.

    Attributes:
        time: of the save, UNIX seconds.
        seconds: how long writing took.
        versions: of what the bits of a resumed run depend on; so does `num_threads`.
        files: by name; every file of the checkpoint but the manifest.
        data: what is told of the data; empty in manifests of earlier versions.
        fencing_epoch: of the lease under which it was written; 0 in manifests of earlier versions, and where
            nobody held one.
    """

    step: int
    epoch: int
    world_size: int
    global_batch_size: int | None
    config: dict[str, Any]
    config_hash: str
    data_fingerprint: str
    metrics: dict[str, float]
    monitor: str
    mode: str
    monitor_value: float | None
    time: float
    seconds: float
    attempt: int
    versions: dict[str, str]
    num_threads: int
    files: dict[str, FileEntry]
    data: dict[str, Any] = field(default_factory=dict)
    fencing_epoch: int = 0

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "files"}
        document = {
            "format_version": FORMAT_VERSION,
            **encode_plain(plain, ()),
            "files": {name: entry._asdict() for name, entry in sorted(self.files.items())},
            "xxh3_128": _NO_CHECKSUM,
        }
        return _sealed(json.dumps(document, indent=1, allow_nan=False).encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read the content of ``manifest.json``.

        Raises:
            NewerFormatError: a later version wrote it.
            CheckpointCorruptError: it is not what was written.
        """
        try:
            if _sealed(data) != data:
                raise ValueError("its checksum is wrong")
            document = json.loads(data)
            _check_format(document)
            return cls._from_document(document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointCorruptError(f"{MANIFEST} is broken: {error}.") from error

    @classmethod
    def _from_document(cls, document: dict[str, Json]) -> "Manifest":
        files = {name: _entry(name, **entry) for name, entry in document["files"].items()}
        if any(type(document[name]) is not int for name in ("step", "epoch", "world_size")):
            raise ValueError("its counts are not whole numbers")
        names = {item.name for item in fields(cls)} - {"files"}
        names -= {"data", "fencing_epoch"} - document.keys()  # the fields that came later
        return cls(**{name: decode(document[name], {}) for name in names}, files=files)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats.

    Raises:
        CheckpointError: one is not a number; names it.
    """
    return {name: _number(name, value) for name, value in metrics.items()}


def config_hash(config: Json) -> str:
    """A hash of a plain configuration that does not depend on the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def library_versions() -> dict[str, str]:
    """Of what decides about bits and formats."""
    return {
        "ray_trainer": _version("ray-trainer"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
    }


def monitor_value(metrics: Mapping[str, float], monitor: str) -> float | None:
    """The monitored metric, unless it is missing or no finite number: a run gone wrong is never best."""
    value = metrics.get(monitor)
    return value if value is not None and math.isfinite(value) else None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"metrics.{name}: {type(value).__name__} is not a number.") from error


@cache
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a source tree on the path
        return "unknown"


def _sealed(data: bytes) -> bytes:
    """The bytes with the checksum field set to the checksum of the bytes with that field at zero."""
    found = data.rfind(b'"xxh3_128": "')
    if found < 0:
        raise ValueError("it is empty" if not data else "it has no checksum")
    position = found + len(b'"xxh3_128": "')
    before, after = data[:position], data[position + len(_NO_CHECKSUM) :]
    digest = xxhash.xxh3_128_hexdigest(before + _NO_CHECKSUM.encode() + after)
    return before + digest.encode() + after


def _check_format(document: dict[str, Json]) -> None:
    found = document["format_version"]
    if type(found) is not int or found < 1:
        raise ValueError(f"format_version {found!r} is none")
    if found > FORMAT_VERSION:
        writer = document.get("versions", {}).get("ray_trainer", "unknown")
        raise NewerFormatError(
            f"The checkpoint has format_version {found}, but ray_trainer {_version('ray-trainer')} reads "
            f"up to {FORMAT_VERSION}. Install ray_trainer {writer}, which wrote it, or a later one."
        )


def _entry(name: str, size: int, xxh3_128: str) -> FileEntry:
    if not _FILE_NAME.fullmatch(name) or type(size) is not int or not _CHECKSUM.fullmatch(xxh3_128):
        raise ValueError(f"its entry for {name!r} is none")
    return FileEntry(size, xxh3_128)
