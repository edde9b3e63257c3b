"""Rows of plain values as lines of strict JSON, in a file or, where storage can't append, a folder."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray_trainer.metrics.appending import AppendingFile
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class JsonlLog:
    """A log of one attempt of a run: ``name``, or ``name/attempt_0003.jsonl`` on object stores.

    Lines are strict JSON, which has no NaN and no infinity: such a value is written as ``null`` and named in
    the row's ``non_finite``, as in ``{"loss": null, "non_finite": {"loss": "nan"}}``.

    Appending never fails: see `degraded`.
    """

    def __init__(self, storage: Storage, name: str, attempt: int, writer: str = "") -> None:
        """Open nothing.

        Args:
            storage: the run's directory.
            name: of the file, or of the folder.
            attempt: which start of the run this is.
            writer: tells processes apart that write the same log at the same time, for object stores.
        """
        self._storage = storage
        self._name = name
        stem = f"{name}/attempt_{attempt:04d}" + (f"-{writer}" if writer else "")

        def name_part(part: int) -> str:
            if _is_one_file(storage, name):
                return name
            return f"{stem}.part{part:04d}.jsonl" if part else f"{stem}.jsonl"

        self._file = AppendingFile(storage, name_part, separator=b"\n")

    @property
    def degraded(self) -> str | None:
        """Why rows are waiting or lost, for the user; None if all is well."""
        return self._file.degraded

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row: one whole line, written at once where storage can append."""
        self._file.append(encode_row(row))

    def flush(self) -> None:
        """Write what waits."""
        self._file.flush()

    def rewind(self, keep: Callable[[Row], bool]) -> None:
        """Drop rows, of earlier attempts too, and lines that a crash has torn; each file whole or not at all.

        For a single writer. Called on resume with the rows up to the resumed step.

        Raises:
            OSError: a file could not be read or written; training on would leave rows twice.
        """
        self.flush()
        for name in _file_names(self._storage, self._name):
            data = self._storage.read(name)
            kept = b"".join(line + b"\n" for line, row in _lines(data) if keep(row))
            if kept != data:
                self._storage.write(name, kept)
        self._file.drop_waiting(lambda record: keep(json.loads(record)))

    def read(self) -> list[Row]:
        """All rows of all attempts that have been written."""
        return read_rows(self._storage, self._name)


def read_rows(storage: Storage, name: str) -> list[Row]:
    """The rows of a log in whichever form it is stored; none if there is no log.

    Lines that are no JSON object, as a crash leaves them, are left out and counted in the log of the program.
    """
    rows: list[Row] = []
    for file_name in _file_names(storage, name):
        data = storage.read(file_name)
        rows += [row for _, row in _lines(data)]
        num_torn = sum(1 for line in data.split(b"\n") if line and _decoded(line) is None)
        if num_torn:
            logger.warning("%s/%s: %d unfinished lines were left out.", storage.uri, file_name, num_torn)
    return rows


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON; zero-dim tensors and arrays as numbers, what JSON does not know as ``str``."""
    non_finite: dict[str, str] = {}
    plain = _plain(dict(row), "", non_finite)
    if non_finite:
        plain["non_finite"] = non_finite
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _plain(value: Any, place: str, non_finite: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite[place] = str(float(value))
        return None
    if isinstance(value, Mapping):
        prefix = f"{place}." if place else ""
        return {str(key): _plain(item, f"{prefix}{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}.{index}", non_finite) for index, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item(), place, non_finite)
    return str(value)


def _lines(data: bytes) -> Iterator[tuple[bytes, Row]]:
    for line in data.split(b"\n"):
        row = _decoded(line)
        if row is not None:
            yield line, row


def _decoded(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_one_file(storage: Storage, name: str) -> bool:
    """Whether rows go into one file; a folder that was copied from an object store stays one."""
    return storage.is_local and not storage.local_path(name).is_dir()


def _file_names(storage: Storage, name: str) -> list[str]:
    if _is_one_file(storage, name):
        return [name] if storage.exists(name) else []
    parts = [f"{name}/{found}" for found in storage.child(name).list() if found.endswith(".jsonl")]
    return [name, *parts] if _is_copied_file(storage, name) else parts


def _is_copied_file(storage: Storage, name: str) -> bool:
    """Whether a run that began on a file system was copied to an object store, where its folder goes on beside it."""
    try:
        storage.size(name)
    except FileNotFoundError:
        return False
    return True
