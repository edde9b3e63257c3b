"""What a sweep writes about itself: its events, from which it goes on after any end, and the summaries for others."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ray_trainer.checkpoint import list_checkpoints
from ray_trainer.checkpoint.retention import RetentionPolicy
from ray_trainer.cluster.trials import TrialRecord, as_csv, ranked, trials_of
from ray_trainer.errors import ConfigError
from ray_trainer.metrics.events import EventLog, next_attempt, read_events
from ray_trainer.storage import Storage

SUMMARY, TABLE, EVENTS = "sweep.json", "trials.csv", "events.jsonl"
Mode = Literal["min", "max"]
SweepStatus = Literal["running", "finished", "interrupted", "out of time", "failed"]


class Ledger:
    """The directory of a sweep, of which one driver at a time is the writer.

    ``events.jsonl`` is the truth: each event is on storage before it counts. ``sweep.json`` and ``trials.csv`` are
    made from it.

    Attributes:
        trials: what is known of each, by name.
    """

    def __init__(self, storage: Storage, definition: Mapping[str, Any], metric: str, mode: Mode) -> None:
        """Read what there is; write nothing.

        Args:
            storage: the directory of the sweep.
            definition: all that makes it this sweep and no other, as plain values.
            metric: compares trials.
            mode: whether less or more of it is better.
        """
        self.storage = storage
        self.metric, self.mode = metric, mode
        self.trials = trials_of(read_events(storage), mode)
        self._definition = json.loads(json.dumps(definition))
        self._known = _read_summary(storage)
        self._elapsed_before_s = float(self._known.get("elapsed_s", 0.0))
        self._since = time.monotonic()
        self._log: EventLog | None = None

    @property
    def elapsed_s(self) -> float:
        """How long the sweep has run, over all its starts."""
        return self._elapsed_before_s + (time.monotonic() - self._since if self._log is not None else 0.0)

    def require_same_sweep(self) -> None:
        """Refuse to mix two sweeps, or a sweep and a run, in one directory.

        Raises:
            ConfigError: what is there is something else; says what differs.
        """
        if not self._known:
            if self.storage.exists("run.yaml"):
                raise ConfigError(
                    f"cluster.name: {self.storage.uri} is the directory of a run. Give the sweep another name."
                )
            return
        before = self._known["definition"]
        differs = [
            f"{name} was {_short(before.get(name))} and is {_short(value)}"
            for name, value in self._definition.items()
            if before.get(name) != value
        ]
        if differs:
            raise ConfigError(
                f"The sweep in {self.storage.uri} was started differently: {'; '.join(differs)}. Bring back what was "
                "there to go on with it, or give this one another cluster.name."
            )

    def open(self) -> None:
        """Begin to write: this process drives the sweep."""
        self._since = time.monotonic()
        attempt = next_attempt(self.storage)
        self._log = EventLog(self.storage, attempt)
        self._log.record("sweep_started" if attempt == 1 else "sweep_resumed")
        self.summarise("running")

    def record(self, event: str, trial: str, **details: Any) -> None:
        """Write down what happened to a trial."""
        assert self._log is not None
        row = self._log.record(event, trial=trial, **details)
        if trial not in self.trials:
            self.trials[trial] = TrialRecord(trial, dict(details["settings"]))
        self.trials[trial].take(json.loads(json.dumps(row)), self.mode)

    def conclude(self, status: SweepStatus, reason: str) -> None:
        """Write the end of this start of the sweep, with the best checkpoint of each trial as it is on storage.

        A trial that has not ended waits for the next start.
        """
        assert self._log is not None
        self.find_checkpoints()
        for trial in self.trials.values():
            trial.status = trial.status if trial.has_ended else "waiting"
        self._log.record("sweep_ended", status=status, reason=reason)
        self.summarise(status)

    def erase(self) -> None:
        """Remove the sweep, of which nothing is worth keeping: the same name is free for another one."""
        for name in (SUMMARY, TABLE, EVENTS, "trials", "exchange"):
            self.storage.delete(name)

    def find_checkpoints(self) -> None:
        """Look up the best checkpoint of each trial; its value is what the trial is judged by.

        A trial that was ended at a report went on until it stopped, so it may have got further than it reported.
        """
        policy = RetentionPolicy(None, 1, self.metric, self.mode)
        for trial in self.trials.values():
            records = list_checkpoints(self.run_of(trial)) if trial.reports else []
            best = policy.best(records)
            if records:
                trial.step, trial.epoch = records[-1].step, records[-1].epoch
            trial.checkpoint = best.uri if best else None
            trial.value = best.metrics[self.metric] if best else None

    def run_of(self, trial: TrialRecord) -> Storage:
        """The directory of a trial."""
        return self.storage.child(f"trials/{trial.name}")

    def ranked(self) -> list[TrialRecord]:
        """The trials, the best first."""
        return ranked(self.trials.values(), self.mode)

    def summarise(self, status: SweepStatus) -> None:
        """Write ``sweep.json`` and ``trials.csv``."""
        order = self.ranked()
        summary = {
            "status": status,
            "metric": self.metric,
            "mode": self.mode,
            "elapsed_s": round(self.elapsed_s, 3),
            "best": order[0].name if order and order[0].value is not None else None,
            "trials": [trial.to_dict() for trial in order],
            "definition": self._definition,
        }
        self.storage.write(SUMMARY, json.dumps(_finite(summary), indent=1, allow_nan=False).encode())
        self.storage.write(TABLE, as_csv(order, self.metric).encode())


def _read_summary(storage: Storage) -> dict[str, Any]:
    if not storage.exists(SUMMARY):
        return {}
    known: dict[str, Any] = json.loads(storage.read(SUMMARY))
    return known


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
