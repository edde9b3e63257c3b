"""What the files of a run tell. Reads only; what is torn, missing or of the wrong type is left out."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ray_trainer.checkpoint import CheckpointRecord, list_checkpoints
from ray_trainer.checkpoint.retention import Mode, RetentionPolicy
from ray_trainer.config.documents import parse_value
from ray_trainer.errors import ConfigError
from ray_trainer.metrics import read_events, read_rows
from ray_trainer.metrics.goodput import Goodput, goodput
from ray_trainer.report.standing import run_state
from ray_trainer.storage import Storage

Row = dict[str, Any]

_LATEST_TIME = 250_000_000_000.0  # year 9892: what calendars can show
_LARGEST_STEP = 2**53


@dataclass(frozen=True)
class RunData:
    """A run at one moment.

    Attributes:
        uri: of its directory.
        now: when it was read, UNIX seconds.
        seen_at: its last sign of life; None if it gave none.
        state: see `run_state`; ``empty`` before there is any event.
        events: oldest first, each with ``time`` and ``event``; ``step``, ``attempt`` and such are whole numbers.
        rows: of the metrics, by step, each (split, step) once; a value that is no finite number is None.
        checkpoints: the whole ones, old to new.
        best: of them, by what was monitored at the newest save.
        training: the section of the configuration; empty if it can't be read.
        config: ``run.yaml`` as it stands.
        environment: versions and machine.
    """

    uri: str
    now: float
    seen_at: float | None
    state: str
    events: list[Row]
    rows: list[Row]
    checkpoints: list[CheckpointRecord]
    best: CheckpointRecord | None
    goodput: Goodput
    training: Row
    config: str
    environment: Row

    @property
    def name(self) -> str:
        """Of the run: the last part of its place."""
        return self.uri.rstrip("/").rpartition("/")[2] or self.uri


def read_run(run: Storage, now: float) -> RunData:
    """Gather what there is.

    Args:
        run: its directory.
        now: UNIX seconds.

    Raises:
        ConfigError: there is no run.
    """
    if not any(run.exists(name) for name in ("events.jsonl", "metrics.jsonl")):  # a user's run.yaml is no run yet
        raise ConfigError(
            f"{run.uri} is no run directory: it has no events.jsonl and no metrics.jsonl. "
            "Name storage_path/name of a run."
        )
    events = _events(run)
    rows = _rows(run)
    seen_at = max((item["time"] for item in (*events, *rows) if "time" in item), default=None)
    state = "empty" if not events else run_state(events, rows, now - cast(float, seen_at))
    records = list_checkpoints(run)
    config = _text(run, "run.yaml")
    return RunData(
        uri=run.uri,
        now=now,
        seen_at=seen_at,
        state=state,
        events=events,
        rows=rows,
        checkpoints=records,
        best=_best(records),
        goodput=goodput(events, until=seen_at if state == "training" else None),
        training=_training(config),
        config=config,
        environment=_environment(_text(run, "environment.json")),
    )


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _events(run: Storage) -> list[Row]:
    return [row for row in map(_typed, read_events(run)) if "time" in row]


def _rows(run: Storage) -> list[Row]:
    found: dict[tuple[str, int], Row] = {}
    for row in map(_typed, read_rows(run, "metrics.jsonl")):
        if "step" in row and row.get("split") in ("train", "val"):
            found[row["split"], row["step"]] = row
    return sorted(found.values(), key=lambda row: row["step"])


def _typed(row: Row) -> Row:
    """The row without what is not of the type that its name stands for."""
    typed = dict(row)
    for name in ("step", "epoch", "attempt", "num_workers"):
        if not _is_count(typed.get(name)):
            typed.pop(name, None)
    for name in ("time", "stall_s"):
        value = finite(typed.pop(name, None))
        if value is not None and 0 <= value < _LATEST_TIME:
            typed[name] = value
    return typed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_STEP


def _best(records: list[CheckpointRecord]) -> CheckpointRecord | None:
    if not records:
        return None
    newest = records[-1]
    return RetentionPolicy(None, 1, newest.monitor, cast(Mode, newest.mode)).best(records)


def _text(run: Storage, name: str) -> str:
    return run.read(name).decode(errors="replace") if run.exists(name) else ""


def _training(config: str) -> Row:
    try:
        values = parse_value(config)
    except ConfigError:
        return {}
    section = values.get("training") if isinstance(values, Mapping) else None
    return dict(section) if isinstance(section, Mapping) else {}


def _environment(text: str) -> Row:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
