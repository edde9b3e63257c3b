"""The driver's side of a sweep while Ray Tune runs it: records, frees, shows, and says when to stop."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import ray
from ray import tune
from ray.actor import ActorHandle

from ray_trainer.cluster.groups import Holdings
from ray_trainer.cluster.ledger import Ledger
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.cluster.takeover import STOP_PATIENCE_S
from ray_trainer.cluster.trials import TrialRecord
from ray_trainer.runtime import Stop

POLL_INTERVAL_S = 0.5
SUMMARY_INTERVAL_S = 15.0
_ANSWERS_WITHIN_S = 30.0


class SweepDisplay(Protocol):
    """Something that shows a sweep while it lasts."""

    def update(self, trials: list[TrialRecord]) -> None:
        """The trials as they are now, the best first."""

    def message(self, text: str) -> None:
        """Something happened."""


class NoSweepDisplay:
    """Shows nothing."""

    def update(self, trials: list[TrialRecord]) -> None:
        """See `SweepDisplay`."""

    def message(self, text: str) -> None:
        """See `SweepDisplay`."""


class Overseer(tune.Callback):
    """Called by Tune's loop, in the thread of the driver.

    Attributes:
        link: between this driver and the trials.
        refusal: why the sweep cannot be carried out at all, or None.
        stop: the signal that ends it, or NONE.
        is_out_of_time: the time budget ends it.
    """

    def __init__(
        self,
        ledger: Ledger,
        link: ActorHandle,
        display: SweepDisplay,
        wish: Callable[[], Stop],
        config: SweepConfig,
    ) -> None:
        self._ledger = ledger
        self.link = link
        self._display = display
        self._wish = wish
        self._config = config
        self._holdings = defaultdict[str, Holdings](Holdings)
        self._busy: set[str] = set()
        self._polled = self._summarised = time.monotonic()
        self._stopping_since: float | None = None
        self.refusal: str | None = None
        self.stop = Stop.NONE
        self.is_out_of_time = False

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of its callbacks, to restore them; this one is never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A process is at work on a trial, for the first time or again."""
        name = str(trial)
        self._free(name)
        self._busy.add(name)
        known = self._ledger.trials.get(name)
        if known is None or known.status == "waiting":
            self._ledger.record("trial_started", name, settings=trial.config["plan"]["settings"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported, or ended; or a scheduler has just decided that this is its end."""
        self._poll()  # what came before this report: a takeover changes whose step this is
        if result.get("interrupted"):
            return
        name, known = str(trial), self._ledger.trials[str(trial)]
        is_known = result.get("step", 0) <= known.step and result["settings"] == known.settings
        if "checkpoint" in result and not is_known:
            self._ledger.record(
                "trial_reported",
                name,
                step=result["step"],
                epoch=result["epoch"],
                units=result["units"],
                value=result[self._ledger.metric],
                checkpoint=result["checkpoint"],
                settings=result["settings"],
            )
        if result.get("done"):
            verdict = f"{self._config.scheduler} ended it, behind the others"
            self._end(name, result.get("ended", "stopped"), result.get("reason", verdict))
            if result.get("refused") and not any(other.reports for other in self._ledger.trials.values()):
                self.refusal = result["reason"]

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a trial failed; another one goes on."""
        self._display.message(f"{trial} is started again: {_last_line(trial)}")
        self._free(str(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a trial failed once too often."""
        self._free(str(trial))
        self._end(str(trial), "failed", _last_line(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune some ten times a second."""
        now = time.monotonic()
        if now - self._polled < POLL_INTERVAL_S:
            return
        self._poll()
        self._decide_to_stop()
        if now - self._summarised > SUMMARY_INTERVAL_S:
            self._summarised = now
            self._ledger.summarise("running")
        self._display.update(self._ledger.ranked())

    def may_end(self) -> bool:
        """Whether Tune is to end: something ends the sweep, and all trials have saved and freed their workers."""
        if self._stopping_since is None:
            return False
        return not self._busy or time.monotonic() - self._stopping_since > 2 * STOP_PATIENCE_S

    def close(self) -> None:
        """Take note of what came last, and free what a trial could not free itself."""
        self._poll()
        for name in list(self._holdings):
            self._free(name)

    def _decide_to_stop(self) -> None:
        self.stop = max(self.stop, self._wish())
        budget_s = self._config.time_budget_s
        self.is_out_of_time = budget_s is not None and self._ledger.elapsed_s >= budget_s
        must_stop = self.stop is not Stop.NONE or self.is_out_of_time or self.refusal is not None
        if must_stop and self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def _poll(self) -> None:
        self._polled = time.monotonic()
        is_stopping = int(self._stopping_since is not None)
        try:
            answer = ray.get(self.link.take.remote(is_stopping), timeout=_ANSWERS_WITHIN_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return  # it starts anew
        self._take(cast(tuple[Any, list[dict[str, Any]]], answer)[1])

    def _take(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            match event:
                case {"event": "message", "text": text}:
                    self._display.message(text)
                case {"event": "trial_took_over", "trial": name, "donor": donor, "settings": settings}:
                    before = self._ledger.trials[name].settings
                    self._ledger.record(**event, before=before)
                    values = ", ".join(f"{key} {_number(value)}" for key, value in settings.items())
                    self._display.message(f"{name} takes over {donor} at step {event['step']}, with {values}")
                case {"event": "trial_progress", "trial": name, "progress": progress}:
                    trial = self._ledger.trials.get(name)
                    if trial is not None:
                        trial.live = progress
                case {"event": "trial_closed", "trial": name}:
                    self._busy.discard(name)
                    self._holdings.pop(name, None)
                case {"trial": name}:
                    self._holdings[name].take(event)

    def _end(self, name: str, status: str, reason: str) -> None:
        self._busy.discard(name)
        if self._ledger.trials[name].has_ended:
            return
        self._ledger.record("trial_ended", name, status=status, reason=reason)
        self._ledger.summarise("running")
        trial = self._ledger.trials[name]
        value = "" if trial.value is None else f", {self._ledger.metric} {_number(trial.value)}"
        self._display.message(f"{name} {status}{value}" + (f": {reason}" if reason else ""))

    def _free(self, name: str) -> None:
        if name in self._holdings:
            self._holdings.pop(name).free()


class WhenOverseen(tune.Stopper):
    """Ends Tune when its overseer says so."""

    def __init__(self, overseer: Overseer) -> None:
        self._overseer: Overseer | None = overseer

    def __getstate__(self) -> dict[str, Any]:
        """See `Overseer`."""
        return {"_overseer": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial by itself."""
        return False

    def stop_all(self) -> bool:
        """See the class."""
        return self._overseer is not None and self._overseer.may_end()


def _last_line(trial: Any) -> str:
    """Type and message of the error that ended a trial's process."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1].strip() if lines else "its process died"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
