"""A trial of a sweep: what Ray Tune runs, and the ordinary `fit` inside of it."""

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.tune import Trainable

from ray_trainer.checkpoint import CheckpointRecord, list_checkpoints
from ray_trainer.cluster.groups import CONTROLLED, ENDED, STARTED
from ray_trainer.cluster.launch import fit_watched
from ray_trainer.cluster.sweep_job import SweepJob
from ray_trainer.cluster.takeover import STOP_PATIENCE_S, TOOK_OVER, Note, Offer, offer, same_decision, take_over
from ray_trainer.errors import ConfigError, DataError, RayTrainerError
from ray_trainer.metrics.events import read_events
from ray_trainer.narration import tell
from ray_trainer.runtime import Stop
from ray_trainer.storage import Storage

logger = logging.getLogger(__name__)

UNITS = "units"
POLL_INTERVAL_S = 0.5
_FINISHED = {"ended": "finished", "reason": ""}


class TrialDriver(Trainable):
    """What Ray Tune starts, stops, pauses and moves on. One process serves several trials, one after another."""

    def setup(self, config: dict[str, Any], job: SweepJob) -> None:
        """Called by Tune in a new process."""
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what matters is an event of ours
        self._job = job
        self._trial = self._open(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune when the process goes over to another trial."""
        self._trial.close()
        self._trial = self._open(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Called by Tune for the next report."""
        return self._trial.next_report()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Called by Tune when others may take over this trial: what is kept in Tune is where to find it."""
        return {"offer": self._trial.offer()}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Called by Tune before a trial that was paused goes on, or that takes over another one."""
        if checkpoint and checkpoint["offer"] is not None:
            self._trial.consider(checkpoint["offer"])

    def cleanup(self) -> None:
        """Called by Tune at the end of the process; its workers are free when it returns."""
        self._trial.close()

    def _open(self, config: dict[str, Any]) -> "TrialRun":
        return TrialRun(self._job, self.trial_name, config["plan"])


class TrialRun:
    """One trial: a `fit` in a thread, and what it reports. Its own directory says where it is; nothing else does."""

    def __init__(self, job: SweepJob, name: str, plan: Mapping[str, Any]) -> None:
        """Start nothing yet.

        Args:
            job: of the sweep.
            name: of the trial.
            plan: ``settings``, the ``history`` of reports that the scheduler has to see again, and the
                ``reported_step``, up to which reports are known.
        """
        self._job, self._name = job, name
        self._run = job.run_of(name)
        self._planned = dict(plan["settings"])
        self._history: Iterator[dict[str, Any]] = iter(plan["history"])
        self._reported_step = int(plan["reported_step"])
        self._note = Note.read(self._run)
        self._last: dict[str, Any] = {}
        self._watch = _TrialWatch(job.link, name)
        self._has_looked_up = False
        self._found: deque[CheckpointRecord] = deque()
        self._thread: threading.Thread | None = None
        self._end: dict[str, Any] | BaseException = {}

    @property
    def _settings(self) -> dict[str, Any]:
        """Those of the newest lineage."""
        return self._planned if self._note is None else self._note.settings

    def consider(self, offered: Mapping[str, Any]) -> None:
        """Take over another trial's checkpoint, unless it is this trial's own or was taken over already."""
        proposal = Offer(**offered)
        if proposal.donor == self._name or same_decision(self._note, proposal.place, self._planned):
            return
        self._note = take_over(self._run, Note(proposal, self._planned))
        self._reported_step, self._history = proposal.step, iter(())
        self._watch.tell_driver(
            "trial_took_over",
            donor=proposal.donor,
            checkpoint=proposal.place,
            settings=self._planned,
            step=proposal.step,
            epoch=proposal.epoch,
        )

    def next_report(self) -> dict[str, Any]:
        """Wait for the next checkpoint with the metric, or for the end of the run.

        The last report comes with the end: of a trial that has nothing left to train, no scheduler decides any more.
        """
        for entry in self._history:
            return {**entry, "replayed": True}
        while True:
            has_ended = self._thread is not None and not self._thread.is_alive()  # first: what it leaves is there then
            record = self._next_record()
            if record is not None and (len(self._found) > 1 or record.step < self._watch.newest_step):
                return self._report(self._found.popleft())
            if self._watch.exchange():
                self.close()
                return {**self._known(), "interrupted": True}
            if self._thread is None and not self._begin():
                has_ended, self._end = True, _FINISHED
            if has_ended:
                return self._last_report(record)
            if self._thread is not None:
                self._thread.join(timeout=POLL_INTERVAL_S)

    def offer(self) -> dict[str, Any] | None:
        """A copy of the checkpoint of the last report, for others; None if there is none to give."""
        if not self._last:
            return None
        exchange = Storage.open(self._job.sweep_dir).child("exchange")
        try:
            return vars(offer(self._run, self._name, self._last["checkpoint"], exchange, self._last[UNITS]))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Let the run save and end, and wait for it: its workers are free then."""
        self._watch.stop = True
        if self._thread is not None:
            self._thread.join(timeout=STOP_PATIENCE_S)
            if self._thread.is_alive():
                logger.warning("%s does not end; its workers are taken away from it.", self._name)
        self._watch.tell_driver("trial_closed")

    def _known(self) -> dict[str, Any]:
        """What schedulers need to find in each result."""
        return {self._job.metric: math.nan, UNITS: 0, "settings": self._settings, **self._last}

    def _begin(self) -> bool:
        """Start the run, after what earlier starts have left to report; False if it is finished."""
        if not self._has_looked_up:
            self._has_looked_up = True
            if self._note is not None:
                self._note = take_over(self._run, self._note)  # what a crash may have left to do
            self._watch.has_saved.set()
        elif is_finished(self._run):
            return False
        else:
            self._thread = threading.Thread(target=self._work, name="ray-trainer-trial", daemon=True)
            self._thread.start()
        return True

    def _work(self) -> None:
        try:
            training, cluster, model = self._job.configure(self._name, self._settings)
            start_from = None if self._note is None else self._note.offer.place
            fit_watched(self._job.experiment, training, cluster, model, nullcontext(self._watch), start_from)
            self._end = _FINISHED
        except SystemExit:
            self._end = {"ended": "stopped", "reason": "stopped from outside"}
        except RayTrainerError as error:
            is_refused = isinstance(error, ConfigError | DataError)
            self._end = {"ended": "failed", "reason": str(error), "refused": is_refused}
        except BaseException as error:  # carried to Tune, which starts the trial again
            self._end = error
        finally:
            self._watch.has_saved.set()

    def _next_record(self) -> CheckpointRecord | None:
        """The next checkpoint with the metric that is not reported yet, if there is one; it stays in its place.

        The run tells that there is something to look at, storage tells what: what a worker had to say when it was
        killed may be lost.
        """
        if self._watch.has_saved.is_set():
            self._watch.has_saved.clear()
            newest = max((record.step for record in self._found), default=self._reported_step)
            self._found.extend(record for record in list_checkpoints(self._run) if record.step > newest)
        while self._found and (
            self._found[0].step <= self._reported_step or self._job.metric not in self._found[0].metrics
        ):
            self._found.popleft()
        return self._found[0] if self._found else None

    def _report(self, record: CheckpointRecord) -> dict[str, Any]:
        value = record.metrics[self._job.metric]
        self._reported_step = record.step
        self._last = {
            self._job.metric: value,
            UNITS: record.step if self._job.counts_steps else record.epoch + 1,
            "step": record.step,
            "epoch": record.epoch,
            "checkpoint": record.name,
            "settings": self._settings,
        }
        if math.isfinite(value):
            return self._last
        reason = f"{self._job.metric} is {value} at step {record.step}"
        return {**self._last, "done": True, "ended": "stopped", "reason": reason}

    def _last_report(self, record: CheckpointRecord | None) -> dict[str, Any]:
        if isinstance(self._end, BaseException):
            raise self._end
        report = self._known() if record is None else self._report(record)
        return {**self._end, "done": True, **report}


def is_finished(run: Storage) -> bool:
    """Whether a run is at its end, by its own events."""
    marks = ("workers_started", "run_finished", TOOK_OVER)
    last = [event["event"] for event in read_events(run) if event["event"] in marks][-1:]
    return last == ["run_finished"]


class _TrialWatch:
    """Follows a `fit` and passes on to the driver of the sweep what it needs to know."""

    def __init__(self, link: ActorHandle, name: str) -> None:
        self._link = link
        self._name = name
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._progress: dict[str, Any] = {}
        self.newest_step = 0
        self.has_saved = threading.Event()
        self.stop = False

    def wish(self) -> Stop:
        """See `Watch`."""
        return Stop.SIGTERM if self.stop else Stop.NONE  # after a preemption a run would go on elsewhere

    def see(self, progress: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        """See `Watch`."""
        with self._lock:
            self._progress = dict(progress)
            self.newest_step = max(self.newest_step, int(progress.get("step", 0)))
            for event in events:
                if event["event"] == "checkpoint_saved":
                    self.has_saved.set()
                elif event["event"] in (CONTROLLED, STARTED, ENDED):
                    self._events.append({**event, "trial": self._name})
                elif text := tell(event):
                    self._events.append({"event": "message", "text": f"{self._name}: {text}"})

    def tell_driver(self, event: str, **details: Any) -> None:
        """Pass on an event at once."""
        with self._lock:
            self._events.append({"event": event, "trial": self._name, **details})
        self.exchange()

    def exchange(self) -> bool:
        """Pass on what is new; whether the whole sweep is to stop."""
        with self._lock:
            events, self._events = self._events, []
            progress, self._progress = self._progress, {}
        if progress:
            events.append({"event": "trial_progress", "trial": self._name, "progress": progress})
        try:
            return bool(ray.get(self._link.exchange.remote({}, events), timeout=30)[0])
        except ray.exceptions.RayError:
            return False  # it starts anew; a trial does not need it
