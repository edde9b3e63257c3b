"""The trials that Ray Tune is to run in this start of a sweep: those that go on, then new ones."""

from typing import Any

from ray import tune

from ray_trainer.cluster.ledger import Ledger
from ray_trainer.cluster.schedule import history_of
from ray_trainer.cluster.search import Search, Settings
from ray_trainer.cluster.trials import TrialRecord, trial_name

Plan = dict[str, Any]
"""``name`` and ``settings`` of a trial, the ``history`` that its scheduler has to see again, ``reported_step``."""


def new_plan(number: int, search: Search) -> Plan:
    """A trial that has not begun."""
    return {"name": trial_name(number), "settings": search.settings(number), "history": [], "reported_step": 0}


def plan_of(trial: TrialRecord, metric: str, scheduler: str) -> Plan:
    """A trial of an earlier start that has not ended."""
    return {
        "name": trial.name,
        "settings": dict(trial.settings),
        "history": history_of(trial, metric, scheduler),
        "reported_step": trial.step,
    }


def known_trials(ledger: Ledger) -> dict[int, tuple[Settings, bool, float | None]]:
    """What a search has to know of earlier starts."""
    return {trial.number: (trial.settings, trial.has_ended, trial.value) for trial in ledger.trials.values()}


class SuggestedPlans(tune.search.Searcher):
    """Hands out plans one at a time, so that each can follow from the results before it."""

    def __init__(self, plans: list[dict[str, Any]], search: Search, num_trials: int, ledger: Ledger) -> None:
        """Begin with the plans that are there, then ask the search.

        Args:
            plans: of trials that go on.
            search: picks the values of new trials.
            num_trials: of the whole sweep.
            ledger: knows the results.
        """
        super().__init__(metric=ledger.metric, mode=ledger.mode)
        self._plans = plans
        self._search = search
        self._numbers = iter(range(len(ledger.trials), num_trials))
        self._ledger = ledger
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """Called by Tune when there is room for a trial."""
        if self._plans:
            plan = self._plans.pop(0)
        else:
            number = next(self._numbers, None)
            if number is None:
                return self.FINISHED
            plan = new_plan(number, self._search)
        self._names[trial_id] = plan["name"]
        return {"plan": plan}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called by Tune at the end of a trial."""
        trial = self._ledger.trials.get(self._names[trial_id])
        if trial is not None:
            self._search.tell(trial.number, trial.value)

    def save(self, checkpoint_path: str) -> None:
        """The ledger knows all there is to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
