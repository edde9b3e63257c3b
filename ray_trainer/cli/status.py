"""``ray-trainer status``: where a run is, from its files alone, so also for one that runs elsewhere."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray_trainer.cli.checkpoints import best_and_newest
from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.output import print_json, print_table
from ray_trainer.cli.places import open_run
from ray_trainer.errors import ConfigError
from ray_trainer.report.data import RunData, finite, read_run
from ray_trainer.report.units import readable_age
from ray_trainer.storage import Storage

_STYLES = {"training": "green", "finished": "bold green", "stopped": "yellow", "failing": "bold red", "silent": "red"}
_NO_METRICS = ("step", "epoch", "split", "time", "non_finite", "samples_per_s", "data_wait_s")

Row = dict[str, Any]


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``status``."""
    parser = add_command(
        subparsers,
        "status",
        help="tell where a run is, also one that runs elsewhere: reads its files, asks no cluster",
        examples="ray-trainer status runs/digits\nray-trainer status runs/digits --json",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run directory, a path or a URI")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``status``.

    Raises:
        ConfigError: there is no run.
    """
    status = run_status(open_run(args.run_dir), time.time())
    if args.json:
        print_json(status)
    else:
        print_table(("run", status["run_dir"]), [line for line in _lines(status) if line[1]], _STYLES)
    return 0


def run_status(run: Storage, now: float) -> Row:
    """What the files of a run tell; plain values, ages as of ``now`` in UNIX seconds.

    Raises:
        ConfigError: there is no run.
    """
    data = read_run(run, now)
    if data.seen_at is None or not data.events:
        raise ConfigError(
            f"{run.uri} is no run directory: its events.jsonl holds no event. Name storage_path/name of a run."
        )
    best, newest = best_and_newest(data.checkpoints)
    return {
        "run_dir": run.uri,
        "state": data.state,
        **_place(data),
        "silent_s": max(0.0, now - data.seen_at),
        "last_seen": data.seen_at,
        "num_checkpoints": len(data.checkpoints),
        "newest_checkpoint": newest and newest.name,
        "newest_checkpoint_step": newest and newest.step,
        "newest_checkpoint_age_s": newest and max(0.0, now - newest.time),
        "best_checkpoint": best and best.name,
        **_history(data.events),
        "goodput": {"ratio": data.goodput.ratio, "total_s": data.goodput.total_s, **asdict(data.goodput)},
    }


def _place(data: RunData) -> Row:
    """How far it is and how fast it goes."""
    train = [row for row in data.rows if row["split"] == "train"]
    val = [row for row in data.rows if row["split"] == "val"]
    known = [item for item in (*data.events, *data.rows) if "step" in item]
    newest = max(known, key=lambda item: (item.get("time", 0.0), item["step"]), default={})
    return {
        "step": newest.get("step"),
        "max_steps": data.training.get("max_steps"),
        "epoch": newest.get("epoch"),
        "epochs": data.training.get("epochs"),
        "samples_per_s": finite(train[-1].get("samples_per_s")) if train else None,
        "train": _metrics(train),
        "val": _metrics(val),
    }


def _metrics(rows: Sequence[Row]) -> Row:
    return {name: value for name, value in rows[-1].items() if name not in _NO_METRICS} if rows else {}


def _history(events: Sequence[Row]) -> Row:
    starts = [event for event in events if event["event"] == "workers_started"]
    failures = [event for event in events if event["event"] == "failure"]
    return {
        "started": events[0]["time"],
        "num_workers": starts[-1].get("num_workers") if starts else None,
        "attempts": max(event.get("attempt", 0) for event in events),
        "failures": len(failures),
        "last_failure": failures[-1].get("cause") if failures else None,
        "skipped_steps": sum(event["event"] == "step_skipped" for event in events),
        "rejected_checkpoints": sum(event["event"] == "checkpoint_rejected" for event in events),
    }


def _lines(status: Row) -> list[tuple[str, str]]:
    """As a person reads it; what is not known is empty."""
    spent = status["goodput"]
    speed = status["samples_per_s"]
    saved = status["newest_checkpoint"]
    return [
        ("state", status["state"]),
        ("last sign of life", f"{readable_age(status['silent_s'])} ago"),
        ("step", _of(status["step"], status["max_steps"])),
        ("epoch", "" if status["epoch"] is None else _of(status["epoch"] + 1, status["epochs"])),
        ("training", _numbers(status["train"])),
        ("validation", _numbers(status["val"])),
        ("speed", "" if speed is None else f"{speed:,.0f} samples/s"),
        ("workers", _text(status["num_workers"])),
        ("newest checkpoint", saved and f"{saved}, {readable_age(status['newest_checkpoint_age_s'])} old"),
        ("best checkpoint", status["best_checkpoint"] or ""),
        ("attempts", _text(status["attempts"])),
        ("failures", _text(status["failures"])),
        ("last failure", _text(status["last_failure"])),
        ("goodput", "" if spent["ratio"] is None else f"{spent['ratio']:.1%} of {readable_age(spent['total_s'])}"),
        ("lost to", _losses(spent)),
    ]


def _losses(spent: Row) -> str:
    named = (("checkpoints", "checkpoint_s"), ("repeated steps", "lost_s"), ("being down", "down_s"))
    return ", ".join(f"{name} {readable_age(spent[key])}" for name, key in named if spent[key] >= 0.5)


def _of(count: int | None, total: int | None) -> str:
    return "" if count is None else f"{count} of {total}" if total else str(count)


def _numbers(values: Row) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
