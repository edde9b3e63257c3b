"""Which values a trial of a sweep gets. Does not import Ray."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ray_trainer.cluster.space import Domain
from ray_trainer.cluster.sweep_config import SweepConfig

Settings = dict[str, Any]
"""Values by dotted name, such as ``{"training.learning_rate": 1e-3}``."""


class Search(Protocol):
    """Picks the values of one trial after another."""

    def settings(self, number: int) -> Settings:
        """The values of the trial with this number, from 0."""

    def resume(self, number: int, settings: Settings) -> None:
        """Take note of a trial of an earlier start that goes on."""

    def tell(self, number: int, value: float | None) -> None:
        """Take note of the result of a trial; None if it has none."""


class DrawnSearch:
    """Values that are drawn, or crossed where the space has grids; each trial's are a function of its number."""

    def __init__(self, config: SweepConfig) -> None:
        self._seed = config.seed
        self._domains = config.domains()
        self._crossed = config.crossed()

    def settings(self, number: int) -> Settings:
        """See `Search`."""
        places = np.random.default_rng([self._seed, number]).random(len(self._domains))
        drawn = {
            name: domain.at(float(place)) for (name, domain), place in zip(self._domains.items(), places, strict=True)
        }
        return drawn | self._point(number)

    def resume(self, number: int, settings: Settings) -> None:
        """See `Search`; trials do not depend on each other."""

    def tell(self, number: int, value: float | None) -> None:
        """See `Search`; trials do not depend on each other."""

    def _point(self, number: int) -> Settings:
        """The point of the grid; the last setting changes first."""
        point: Settings = {}
        for name, domain in reversed(self._crossed.items()):
            number, index = divmod(number, len(domain.values))
            point[name] = domain.values[index]
        return point


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), through its ask-and-tell interface.

    A sweep that goes on tells it again what is known; its own draws then start from another seed, so that it does
    not repeat itself.
    """

    def __init__(self, config: SweepConfig, mode: str, num_known: int) -> None:
        """Begin a study in memory.

        Args:
            config: the space.
            mode: min or max.
            num_known: trials of earlier starts.
        """
        self._optuna: Any = importlib.import_module("optuna")  # an extra, and slow to import
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._domains = config.domains()
        self._study = self._optuna.create_study(
            direction="minimize" if mode == "min" else "maximize",
            sampler=self._optuna.samplers.TPESampler(seed=config.seed + num_known, constant_liar=True),
        )
        self._asked: dict[int, Any] = {}

    def settings(self, number: int) -> Settings:
        """See `Search`."""
        trial = self._study.ask(self._distributions())
        self._asked[number] = trial
        return {name: self._value(domain, trial.params[name]) for name, domain in self._domains.items()}

    def resume(self, number: int, settings: Settings) -> None:
        """See `Search`."""
        self._study.enqueue_trial({name: self._parameter(name, settings[name]) for name in self._domains})
        self._asked[number] = self._study.ask(self._distributions())

    def tell(self, number: int, value: float | None) -> None:
        """See `Search`."""
        trial = self._asked.pop(number, None)
        if trial is None:
            return
        if value is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, value)

    def _distributions(self) -> dict[str, Any]:
        return {name: self._distribution(domain) for name, domain in self._domains.items()}

    def _distribution(self, domain: Domain) -> Any:
        kinds = self._optuna.distributions
        if domain.is_listed:
            return kinds.CategoricalDistribution(range(len(domain.values)))  # by place: a value may be a list
        low, high = domain.values
        if domain.kind == "randint":
            return kinds.IntDistribution(low, high - 1)
        return kinds.FloatDistribution(low, high, log=domain.kind == "loguniform")

    def _value(self, domain: Domain, parameter: Any) -> Any:
        return domain.values[parameter] if domain.is_listed else parameter

    def _parameter(self, name: str, value: Any) -> Any:
        domain = self._domains[name]
        return domain.values.index(value) if domain.is_listed else value


def open_search(config: SweepConfig, mode: str, known: Mapping[int, tuple[Settings, bool, float | None]]) -> Search:
    """The configured search, with what earlier starts of the sweep found.

    Args:
        config: the sweep.
        mode: min or max.
        known: of each earlier trial its settings, whether it has ended, and its value.
    """
    if config.search != "optuna":
        return DrawnSearch(config)
    search = OptunaSearch(config, mode, len(known))
    for number, (settings, has_ended, value) in sorted(known.items()):
        search.resume(number, settings)
        if has_ended:
            search.tell(number, value)
    return search
