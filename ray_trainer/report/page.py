"""The page: what was read, put into a template in which every value is escaped."""

from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader

from ray_trainer.report import charts, timeline
from ray_trainer.report.data import RunData
from ray_trainer.report.units import readable_age, readable_number, readable_time

_MOST_CONFIG = 100_000  # characters
_LONGEST_FACT = 300
_RECOVERIES = ("resumed", "rejoined", "rolled_back")
_PARTS = {
    "useful_s": "steps that count",
    "checkpoint_s": "waiting for checkpoints",
    "lost_s": "steps done again",
    "down_s": "without workers",
}


def render(run: RunData) -> str:
    """The whole page as HTML that needs nothing else: no script, no network."""
    names = charts.metric_names(run.rows)
    marked = [event["step"] for event in run.events if event["event"] in _RECOVERIES and "step" in event]
    entries, num_left_out = timeline.entries(run)
    environment = Environment(
        loader=PackageLoader("ray_trainer.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        run=run,
        facts=[(name, text) for name, text in _facts(run) if text],
        versions=_versions(run),
        metrics=charts.charts(names[: charts.MAX_CHARTS], run.rows, marked),
        names_left_out=names[charts.MAX_CHARTS :][:100],
        speed=charts.charts(charts.speed_names(), run.rows, marked),
        box=charts,
        lanes=timeline.lanes(run),
        span=_span(run),
        entries=entries,
        num_left_out=num_left_out,
        parts=_parts(run),
        config=run.config[:_MOST_CONFIG],
        written=readable_time(run.now),
        version=version("ray-trainer"),
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    """As a person reads them; what is not known is empty."""
    newest_rows = {row["split"]: row for row in run.rows}
    newest = max((*run.events, *run.rows), key=lambda item: item.get("step", -1), default={})
    step, epoch = newest.get("step"), newest.get("epoch")
    counts = {name: sum(event["event"] == name for event in run.events) for name in ("failure", "hang", "rejoined")}
    started = [event for event in run.events if event["event"] == "workers_started"]
    speed = newest_rows.get("train", {}).get("samples_per_s")
    saved = run.checkpoints[-1] if run.checkpoints else None
    return [
        ("step", _of(step, run.training.get("max_steps"))),
        ("epoch", "" if epoch is None else _of(epoch + 1, run.training.get("epochs"))),
        ("started", readable_time(run.events[0]["time"]) if run.events else ""),
        ("last sign of life", "" if run.seen_at is None else readable_time(run.seen_at)),
        ("workers", str(started[-1].get("num_workers", "")) if started else ""),
        ("attempts", str(max((event.get("attempt", 0) for event in run.events), default=0) or "")),
        ("failures", str(counts["failure"])),
        ("hangs", str(counts["hang"] or "")),
        ("workers replaced", str(counts["rejoined"] or "")),
        ("goodput", "" if run.goodput.ratio is None else f"{run.goodput.ratio:.1%}"),
        ("speed", f"{speed:,.0f} samples/s" if isinstance(speed, int | float) else ""),
        ("checkpoints", str(len(run.checkpoints))),
        ("best checkpoint", _best(run)),
        ("newest checkpoint", saved.name if saved else ""),
    ]


def _best(run: RunData) -> str:
    best = run.best
    if best is None:
        return ""
    value = "" if best.monitor_value is None else f" ({best.monitor} {best.monitor_value:.4g})"
    return f"{best.name}{value}"


def _of(count: int | None, total: Any) -> str:
    if count is None:
        return ""
    return f"{count} of {total}" if isinstance(total, int) and total else str(count)


def _versions(run: RunData) -> list[tuple[str, str]]:
    known = dict(run.environment)
    packages = known.pop("packages", None)
    found = {**(packages if isinstance(packages, dict) else {}), **known}
    return [
        (str(name), str(value)[:_LONGEST_FACT]) for name, value in list(found.items())[:60] if value not in (None, [])
    ]


def _span(run: RunData) -> tuple[str, str, str]:
    """Start, length and end of the timeline."""
    if not run.events or run.seen_at is None:
        return "", "", ""
    start, end = run.events[0]["time"], max(run.seen_at, run.events[-1]["time"])
    return readable_time(start), readable_age(end - start), readable_time(end)


def _parts(run: RunData) -> list[dict[str, Any]]:
    """Of the time of the run: name, duration, and where it stands on a bar of 100 %."""
    total_s, place, parts = run.goodput.total_s, 0.0, []
    if total_s <= 0:
        return []
    for name, label in _PARTS.items():
        seconds = getattr(run.goodput, name)
        share = seconds / total_s * 100
        length = readable_age(seconds) if seconds >= 10 else f"{readable_number(round(seconds, 2))} s"
        parts.append({"name": name, "label": label, "length": length, "share": share, "place": place})
        place += share
    return parts
