"""``ray-trainer checkpoints``: what there is, which is best and newest, whether each file is whole. Changes nothing."""

import argparse
import time
from dataclasses import asdict
from typing import Any, cast

from ray_trainer.checkpoint import CheckpointRecord, list_checkpoints, verify
from ray_trainer.checkpoint.catalog import checkpoint_names, is_checkpoint
from ray_trainer.checkpoint.retention import Mode, RetentionPolicy
from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.output import print_json, print_table
from ray_trainer.cli.places import open_run
from ray_trainer.cluster.working_dir import readable_size
from ray_trainer.errors import CheckpointNotFoundError, NewerFormatError
from ray_trainer.report.units import readable_age
from ray_trainer.storage import Storage

_STYLES = {"whole": "green", "broken": "bold red", "best": "green", "newest": "cyan", "best, newest": "green"}


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``checkpoints list`` and ``checkpoints verify``."""
    parser = add_command(
        subparsers,
        "checkpoints",
        help="list the checkpoints of a run, or check each of their files",
        examples="ray-trainer checkpoints list runs/digits\nray-trainer checkpoints verify runs/digits",
    )
    commands = parser.add_subparsers(dest="checkpoints_command", required=True, metavar="COMMAND")
    listing = add_command(
        commands,
        "list",
        help="list the checkpoints of a run, old to new; compares sizes, computes no checksums",
        examples="ray-trainer checkpoints list runs/digits\nray-trainer checkpoints list runs/digits --json",
    )
    listing.add_argument("run_dir", metavar="RUN_DIR", help="a run directory, a path or a URI")
    listing.set_defaults(run=run_list)
    checking = add_command(
        commands,
        "verify",
        help="read every file of every checkpoint and compare checksums; exit code 1 if one is broken",
        examples="ray-trainer checkpoints verify runs/digits\nray-trainer checkpoints verify runs/digits --json",
    )
    checking.add_argument("run_dir", metavar="RUN_DIR", help="a run directory or one checkpoint, a path or a URI")
    checking.set_defaults(run=run_verify)
    for command in (listing, checking):
        command.add_argument("--json", action="store_true", help="for scripts")


def run_list(args: argparse.Namespace) -> int:
    """Carry out ``checkpoints list``.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    rows = checkpoint_rows(open_run(args.run_dir))
    if args.json:
        print_json(rows)
        return 0
    now = time.time()
    print_table(
        ("checkpoint", "step", "epoch", "age", "size", "metric", ""), [_cells(row, now) for row in rows], _STYLES
    )
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Carry out ``checkpoints verify``; 1 if one is broken.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    place = open_run(args.run_dir)
    run, names = (place, checkpoint_names(place))
    if is_checkpoint(place):
        parent, _, name = place.path.rstrip("/").rpartition("/")
        run, names = Storage.of(place.filesystem, parent), [name]
    _require_some(place, names)
    found = {name: problems_of(run, name) for name in names}
    if args.json:
        print_json([{"name": name, "is_whole": not found[name], "problems": found[name]} for name in names])
    else:
        rows = [(name, "broken" if found[name] else "whole", "; ".join(found[name])) for name in names]
        print_table(("checkpoint", "state", "problems"), rows, _STYLES)
    return 1 if any(found.values()) else 0


def checkpoint_rows(run: Storage) -> list[dict[str, Any]]:
    """All checkpoints of a run, old to new, also those that are not whole, which have a ``problem``.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    records = {record.name: record for record in list_checkpoints(run)}
    names = checkpoint_names(run)
    _require_some(run, names)
    best, newest = best_and_newest(list(records.values()))
    rows = []
    for name in names:
        record = records.get(name)
        if record is None:
            rows.append({"name": name, "is_whole": False, "problem": "; ".join(problems_of(run, name))})
            continue
        marks = {"is_best": record == best, "is_newest": record == newest, "is_whole": True, "problem": None}
        rows.append({**asdict(record), **marks})
    return rows


def best_and_newest(records: list[CheckpointRecord]) -> tuple[CheckpointRecord | None, CheckpointRecord | None]:
    """By what the run monitored at its newest save."""
    if not records:
        return None, None
    newest = records[-1]
    return RetentionPolicy(None, 1, newest.monitor, cast(Mode, newest.mode)).best(records), newest


def problems_of(run: Storage, name: str) -> list[str]:
    """What is wrong with a checkpoint, in words; nothing if each file is whole."""
    try:
        return verify(run, name)
    except NewerFormatError as error:
        return [f"cannot be checked: {error}"]


def _require_some(place: Storage, names: list[str]) -> None:
    if not place.exists():
        raise CheckpointNotFoundError(f"There is no run directory {place.uri}.")
    if not names:
        raise CheckpointNotFoundError(f"No checkpoints found in {place.uri}.")


def _cells(row: dict[str, Any], now: float) -> tuple[str, ...]:
    if not row["is_whole"]:
        return (row["name"], "-", "-", "-", "-", "-", f"broken: {row['problem']}")
    value = row["monitor_value"]
    metric = "-" if value is None else f"{value:.4g} {row['monitor']}"
    marks = ", ".join(mark for mark, is_so in (("best", row["is_best"]), ("newest", row["is_newest"])) if is_so)
    age, size = readable_age(now - row["time"]), readable_size(row["size_bytes"])
    return (row["name"], str(row["step"]), str(row["epoch"]), age, size, metric, marks)
