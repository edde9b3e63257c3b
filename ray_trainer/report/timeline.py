"""When what happened: lanes over the time of the run, and the list of events."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ray_trainer.report.data import Row, RunData, finite
from ray_trainer.report.sentences import kind_of, sentence
from ray_trainer.report.units import readable_age, readable_time

MOST_LISTED = 500
_PLACES = 400  # across the page: marks closer than that are one
_LONGEST_HINT = 160
_LANES = {"trouble": "trouble", "recovery": "recovery", "checkpoint": "checkpoints", "note": "other"}
_GROUPED = ("checkpoint_saved", "checkpoint_skipped", "step_skipped")


@dataclass(frozen=True)
class Mark:
    """Something on the timeline; places and widths in percent.

    Attributes:
        text: what it is, shown by the browser at the pointer.
        width: 0 for a moment.
    """

    place: float
    text: str
    width: float = 0.0


@dataclass(frozen=True)
class Lane:
    """Marks of one kind."""

    kind: str
    label: str
    marks: list[Mark]


@dataclass(frozen=True)
class Entry:
    """A line of the list of events."""

    kind: str
    time: str
    after: str
    step: str
    text: str


def lanes(run: RunData) -> list[Lane]:
    """The workers, and each kind of event that there is."""
    if not run.events or run.seen_at is None:
        return []
    start, end = float(run.events[0]["time"]), float(max(run.seen_at, run.events[-1]["time"]))
    span = (end - start) or 1.0

    def place(time: float) -> float:
        return round((min(max(time, start), end) - start) / span * 100, 2)

    found = [Lane("start", "workers", [Mark(place(a), text, place(b) - place(a)) for a, b, text in _shifts(run, end)])]
    for kind, label in _LANES.items():
        marks: dict[int, Mark] = {}
        for event in run.events:
            if kind_of(event["event"]) == kind:
                at = place(event["time"])
                text = f"{readable_time(event['time'])}: {sentence(event)[:_LONGEST_HINT]}"
                marks.setdefault(round(at / 100 * _PLACES), Mark(at, text))
        found.append(Lane(kind, label, list(marks.values())))
    return [lane for lane in found if lane.marks]


def entries(run: RunData) -> tuple[list[Entry], int]:
    """The list of events, with repeated ones in one line; and how many lines in the middle were left out."""
    lines = []
    for name, group in groupby(run.events, key=lambda event: (event["event"], event.get("attempt"))):
        same = list(group)
        lines += [_summary(same, run)] if name[0] in _GROUPED and len(same) > 2 else [_entry(one, run) for one in same]
    num_left_out = max(0, len(lines) - MOST_LISTED)
    if num_left_out:
        lines = lines[: MOST_LISTED // 2] + lines[-MOST_LISTED // 2 :]
    return lines, num_left_out


def _entry(event: Row, run: RunData) -> Entry:
    after = readable_age(event["time"] - run.events[0]["time"])
    step = str(event["step"]) if "step" in event else ""
    return Entry(kind_of(event["event"]), readable_time(event["time"]), after, step, sentence(event))


def _summary(events: Sequence[Row], run: RunData) -> Entry:
    """Several of the same kind in a row."""
    first, last = _entry(events[0], run), _entry(events[-1], run)
    what = events[0]["event"]
    text = {"checkpoint_saved": "checkpoints were saved", "step_skipped": "steps were skipped"}.get(
        what, "checkpoints were left out"
    )
    waits = [wait for event in events if (wait := finite(event.get("stall_s"))) is not None]
    waited = f"; training waited {sum(waits):.2f} s for them" if waits else ""
    step = f"{first.step} to {last.step}" if first.step and last.step else ""
    return Entry(first.kind, first.time, first.after, step, f"{len(events)} {text} until {last.time}{waited}.")


def _shifts(run: RunData, end: float) -> list[tuple[float, float, str]]:
    """From when to when workers were there."""
    starts = [place for place, event in enumerate(run.events) if event["event"] == "workers_started"]
    signs = sorted(item["time"] for item in (*run.events, *run.rows) if "time" in item) if starts else []
    shifts = []
    for place, following in pairwise([*starts, len(run.events)]):
        begun = run.events[place]
        until = run.events[following]["time"] if following < len(run.events) else end
        ended = _ended(run.events[place + 1 : following])
        last_sign = signs[bisect_left(signs, until) - 1] if following < len(run.events) else end
        stop = max(begun["time"], last_sign if ended is None else ended)
        who = f"{begun.get('num_workers', '?')} workers, attempt {begun.get('attempt', '?')}"
        shifts.append((begun["time"], stop, f"{who}: {readable_age(stop - begun['time'])}"))
    return shifts[-400:]


def _ended(events: Sequence[Row]) -> float | None:
    """When workers are known to have ended."""
    known = (event["time"] for event in events if event["event"] in ("failure", "interrupted", "run_finished"))
    return next(known, None)
