"""What is known of the trials of a sweep: a pure function of the events that were recorded. Does not import Ray."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
#: Statuses of trials that are never run again.
ENDED = ("finished", "stopped", "failed")


@dataclass
class Report:
    """A checkpoint of a trial that has the metric.

    Attributes:
        units: epochs, or steps where those decide about validations.
        value: of the metric.
        checkpoint: its name in the trial's directory.
    """

    units: int
    step: int
    epoch: int
    value: float
    checkpoint: str


@dataclass
class TrialRecord:
    """A trial of a sweep.

    Attributes:
        name: of its directory in ``trials/``.
        settings: what it changes, by dotted name; the newest ones where it took over another trial.
        reason: why it ended.
        takeovers: the trials that it took over, in order.
        value: the best reported value, or None.
        checkpoint: the best checkpoint, a path or URI, once the sweep has ended.
        live: the newest progress of its run; not kept.
    """

    name: str
    settings: dict[str, Any]
    status: Status = "waiting"
    reason: str = ""
    reports: list[Report] = field(default_factory=list)
    takeovers: list[str] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    value: float | None = None
    checkpoint: str | None = None
    live: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Its place in the sweep, from 0."""
        return int(self.name.rpartition("_")[2])

    @property
    def has_ended(self) -> bool:
        """Whether it is never run again."""
        return self.status in ENDED

    def best(self, mode: str) -> Report | None:
        """The best report; of equal ones the earliest."""
        sign = 1 if mode == "min" else -1
        finite = [report for report in self.reports if math.isfinite(report.value)]
        return min(finite, key=lambda report: sign * report.value, default=None)

    def take(self, event: Mapping[str, Any], mode: str) -> None:
        """Take note of one event of this trial."""
        match event["event"]:
            case "trial_started":
                self.status = "running"
            case "trial_reported":
                value = event["value"] if event["value"] is not None else math.nan
                report = Report(event["units"], event["step"], event["epoch"], value, event["checkpoint"])
                self.reports.append(report)
                self.settings = dict(event["settings"])
                self.step, self.epoch = report.step, report.epoch
            case "trial_took_over":
                self.takeovers.append(event["donor"])
                self.settings = dict(event["settings"])
                self.reports = []  # those are of weights that are gone
                self.step, self.epoch = event["step"], event["epoch"]
            case "trial_ended":
                self.status, self.reason = event["status"], event["reason"]
        best = self.best(mode)
        self.value = best.value if best else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        values = asdict(self)
        del values["live"]
        return values


def trial_name(number: int) -> str:
    """The name of a trial and its directory."""
    return f"trial_{number:04d}"


def trials_of(events: Iterable[Mapping[str, Any]], mode: str) -> dict[str, TrialRecord]:
    """The trials that events tell of, in the order of their numbers."""
    trials: dict[str, TrialRecord] = {}
    for event in events:
        name = event.get("trial")
        if name is None:
            continue
        if name not in trials:
            trials[name] = TrialRecord(name, dict(event.get("settings", {})))
        trials[name].take(event, mode)
    return dict(sorted(trials.items(), key=lambda item: item[1].number))


def ranked(trials: Iterable[TrialRecord], mode: str) -> list[TrialRecord]:
    """The best first; those without a value last, by their numbers."""
    sign = 1 if mode == "min" else -1
    return sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.number))


def as_csv(trials: Sequence[TrialRecord], metric: str) -> str:
    """A table with a line for each trial."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", metric, "epoch", "step", *names, "checkpoint", "takeovers", "reason"])
    for trial in trials:
        value = "" if trial.value is None else repr(trial.value)
        values = [trial.settings.get(name, "") for name in names]
        last = [trial.checkpoint or "", " ".join(trial.takeovers), trial.reason]
        writer.writerow([trial.name, trial.status, value, trial.epoch, trial.step, *values, *last])
    return text.getvalue()
