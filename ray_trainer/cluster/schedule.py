"""Who ends the trials of a sweep early, or lets them take over each other: Ray Tune's schedulers, as configured."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from ray_trainer.cluster.space import Domain
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.cluster.trial import UNITS
from ray_trainer.cluster.trials import TrialRecord

_NO_END = 10**9  # asha ends no trial for being long


def build_scheduler(config: SweepConfig, metric: str, mode: str) -> TrialScheduler:
    """The configured scheduler, of which nothing is known yet."""
    objective = {"time_attr": UNITS, "metric": metric, "mode": mode}
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            **objective,
            max_t=_NO_END,
            grace_period=config.grace_period,
            reduction_factor=config.reduction_factor,
        )
    if config.scheduler == "median":
        return MedianStoppingRule(**objective, grace_period=config.grace_period, min_samples_required=config.min_trials)
    if config.scheduler == "pbt":
        return _population(config, objective)
    return FIFOScheduler()


def _population(config: SweepConfig, objective: dict[str, Any]) -> TrialScheduler:
    evolved = config.evolved()

    def within_bounds(plan: dict[str, Any]) -> dict[str, Any]:
        settings = plan["plan"]["settings"]
        for name, domain in evolved.items():
            settings[name] = domain.clamp(settings[name])
        return plan

    return PopulationBasedTraining(
        **objective,
        perturbation_interval=config.perturbation_interval,
        quantile_fraction=config.quantile_fraction,
        resample_probability=config.resample_probability,
        hyperparam_mutations={"plan": {"settings": {name: _tunes(domain) for name, domain in evolved.items()}}},
        custom_explore_fn=within_bounds,
        log_config=False,
    )


def _tunes(domain: Domain) -> Any:
    """The domain in Tune's terms."""
    if domain.is_listed:
        return list(domain.values)
    return {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}[domain.kind](
        *domain.values
    )


def prime(scheduler: TrialScheduler, ended: Iterable[TrialRecord], metric: str) -> None:
    """Tell a scheduler of trials that ended in an earlier start of the sweep: Tune does not keep what it knew.

    A population needs none of it: it compares those that are alive.
    """
    nobody = SimpleNamespace(get_live_trials=list, get_trials=list)
    for trial in ended:
        stand_in = _StandIn(trial.name)
        results = [as_result(metric, report.value, report.units) for report in trial.reports]
        if isinstance(scheduler, MedianStoppingRule):
            for result in results:
                scheduler.on_trial_complete(nobody, stand_in, result)  # notes it, and decides nothing
        elif isinstance(scheduler, AsyncHyperBandScheduler):
            scheduler.on_trial_add(nobody, stand_in)
            for result in results:
                scheduler.on_trial_result(nobody, stand_in, result)


def as_result(metric: str, value: float, units: int) -> dict[str, Any]:
    """A report as schedulers see it."""
    return {metric: value, UNITS: units}


class _StandIn:
    """As much of a trial as a scheduler looks at."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


def history_of(trial: TrialRecord, metric: str, scheduler: str) -> list[Mapping[str, Any]]:
    """The reports of a trial that goes on, for the scheduler to see again; a population forgets."""
    if scheduler not in ("asha", "median"):
        return []
    return [
        {**as_result(metric, report.value, report.units), "step": report.step, "settings": trial.settings}
        for report in trial.reports
    ]
