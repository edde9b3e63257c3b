"""What operators see of a run: gauges that Ray exports to Prometheus and shows in its dashboard.

Rank 0 alone sets them, so that a sum over workers counts nothing twice, and each has the one tag ``run``. All are
gauges: a counter would begin at zero with each process, and a run has many.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Gauge

from ray_trainer.metrics import read_events
from ray_trainer.metrics.goodput import Goodput, goodput
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

#: By the names that Prometheus knows, which are Ray's with ``ray_`` in front.
METRICS = {
    "trainer_step": "Completed optimizer steps",
    "trainer_epoch": "Epoch in progress, counted from 0",
    "trainer_loss": "Mean training loss over the last logging interval",
    "trainer_val_loss": "Loss of the last validation",
    "trainer_samples_per_second": "Samples trained on a second, over all workers",
    "trainer_num_workers": "Workers that train together",
    "trainer_goodput_ratio": "Share of the time since the run began that went into steps that count",
    "trainer_checkpoint_age_seconds": "Time since the newest checkpoint was saved, or since training began",
    "trainer_checkpoint_stall_seconds": "How long training waited for the newest checkpoint",
    "trainer_restarts": "Starts of the workers after the first one",
    "trainer_failures": "Failures of workers, over all starts",
    "trainer_skipped_steps": "Steps skipped for gradients that were no numbers, since the last start",
    "trainer_last_step_timestamp_seconds": "When the newest step was seen, UNIX time; stands still if training hangs",
}
REFRESH_INTERVAL_S = 2.0


class Telemetry:
    """Rank 0's gauges of one run.

    What it is told it takes in microseconds. A thread brings up to date what changes with time alone.
    """

    def __init__(self, run: str, storage: Storage, is_on: bool = True, clock: Callable[[], float] = time.time) -> None:
        """Set nothing yet.

        Args:
            run: name of the run, the tag.
            storage: its directory, for what happened in earlier attempts.
            is_on: whether this is rank 0; others set nothing.
            clock: UNIX seconds.
        """
        names = METRICS if is_on else {}
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in names.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._storage = storage
        self._clock = clock
        self._step = -1
        self._skipped = 0
        self._saved_at_s = self._started_at_s = time.monotonic()
        self._past = Goodput()
        self._waited_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="ray-trainer-telemetry", daemon=True)

    def open(self) -> None:
        """Begin to keep ages up to date."""
        if self._gauges:
            self._thread.start()

    def close(self) -> None:
        """End that; the gauges stay as they are until Ray forgets this process."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def progress(self, record: Mapping[str, Any]) -> None:
        """Take a `ProgressRecord`'s values."""
        if record["step"] != self._step:
            self._step = record["step"]
            self._set("trainer_last_step_timestamp_seconds", self._clock())
        self._set("trainer_step", record["step"])
        self._set("trainer_epoch", record["epoch"])
        self._set("trainer_loss", record["loss"])
        self._set("trainer_val_loss", record["val_metrics"].get("loss"))
        self._set("trainer_samples_per_second", record["samples_per_s"])
        self._set("trainer_num_workers", record["num_workers"])

    def event(self, event: str, details: Mapping[str, Any]) -> None:
        """Take an event of the run, with its row."""
        match event:
            case "workers_started":
                self._begin(details)
            case "checkpoint_saved":
                self._saved_at_s = time.monotonic()
                self._waited_s += details["stall_s"]
                self._set("trainer_checkpoint_stall_seconds", details["stall_s"])
            case "step_skipped":
                self._skipped += 1
                self._set("trainer_skipped_steps", self._skipped)

    def _begin(self, details: Mapping[str, Any]) -> None:
        self._started_at_s = self._saved_at_s = time.monotonic()
        self._set("trainer_restarts", details["attempt"] - 1)
        self._set("trainer_num_workers", details["num_workers"])
        self._set("trainer_skipped_steps", 0)
        try:
            events = read_events(self._storage)
        except OSError as error:
            logger.warning("Goodput is counted from this start on, because the events of the run are away: %s", error)
            return
        self._past = goodput(events)
        self._set("trainer_failures", sum(event.get("event") == "failure" for event in events))

    def _refresh(self) -> None:
        while True:
            now_s = time.monotonic()
            self._set("trainer_checkpoint_age_seconds", now_s - self._saved_at_s)
            self._set("trainer_goodput_ratio", self._past.later(now_s - self._started_at_s, self._waited_s).ratio)
            if self._closed.wait(REFRESH_INTERVAL_S):
                return

    def _set(self, name: str, value: float | None) -> None:
        if value is not None and name in self._gauges:
            self._gauges[name].set(float(value))
