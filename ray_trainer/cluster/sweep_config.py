"""What a sweep searches, how, and for how long: `SweepConfig`. Does not import Ray."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from ray_trainer.cluster.space import KINDS, Domain, domain_problem, read_domain
from ray_trainer.config import TrainingConfig
from ray_trainer.config.fields import Count, CountOrZero, Positive, Text, did_you_mean
from ray_trainer.config.schema import Rule, Section
from ray_trainer.config.training import Duration

_WORDS = "a mapping from settings to domains, such as {training.learning_rate: {loguniform: [1.0e-4, 1.0e-1]}}"
_DOMAIN_SCHEMA = {
    "type": "object",
    "properties": {kind: {"type": "array", "minItems": 1} for kind in KINDS},
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
Space = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": r"^(training|model)\..+"},
            "additionalProperties": _DOMAIN_SCHEMA,
            "patternErrorMessage": _WORDS,
        }
    ),
]

#: Settings that say how a run is kept and watched, not how it learns: there is nothing to search in them.
_NOT_SEARCHED = frozenset(
    (
        "monitor", "mode", "checkpoint_dir", "run_name", "notes", "tensorboard", "log_every_n_steps", "fast_dev_run",
        "keep_last_n", "keep_best_k", "save_every_n_epochs", "save_every_n_steps", "save_every_minutes", "max_time",
    )
)  # fmt: skip
#: Settings that a run may change when it goes on from a checkpoint, so that a population can evolve them.
EVOLVABLE = frozenset(
    f"training.{name}"
    for name in (
        "learning_rate", "weight_decay", "betas", "momentum", "max_grad_norm", "lr_scheduler_type", "min_lr_ratio",
        "decay_ratio", "gradient_explosion_threshold",
    )
)  # fmt: skip

_SYNONYMS = {
    "space": "param_space search_space parameters params config",
    "search": "searcher search_alg sampler algorithm method",
    "num_samples": "num_trials n_trials trials samples population_size",
    "max_concurrent_trials": "max_concurrent concurrency n_jobs parallel_trials",
    "time_budget": "time_budget_s timeout timeout_s budget",
    "mode": "direction goal",
    "metric": "objective monitor",
    "seed": "random_state random_seed",
    "perturbation_interval": "perturb_interval interval",
    "scheduler": "pruner",
}


def _unusable_space(config: "SweepConfig") -> str | None:
    problems = [f"{name}: {problem}" for name, text in config.space.items() if (problem := _problem_of(name, text))]
    return "; ".join(problems) or None


def _problem_of(name: str, notation: object) -> str | None:
    section, _, setting = name.partition(".")
    if section not in ("training", "model") or not all(setting.split(".")):
        hint = f"; did you mean 'training.{name}'?" if name in TrainingConfig.__dataclass_fields__ else ""
        return f"no such setting; a sweep varies 'training.NAME' and 'model.NAME'{hint}"
    if section == "training":
        if setting not in TrainingConfig.__dataclass_fields__:
            return TrainingConfig.hint(setting)
        if setting in _NOT_SEARCHED:
            return "it does not change what is learned, so there is nothing to search; set it in `training`"
    problem = domain_problem(notation)
    if problem is None and section == "training":
        assert isinstance(notation, Mapping)
        return next(_refused_values(setting, read_domain(notation)), None)
    return problem


def _refused_values(setting: str, domain: Domain) -> Iterator[str]:
    for value in domain.extremes():
        for problem in TrainingConfig(**{setting: value}).problems():
            if problem.name == setting:
                yield f"{domain.kind} holds {value!r}, but it {problem.message.partition(';')[0]}"


def _searched_otherwise(config: "SweepConfig") -> str | None:
    domains = config.domains()
    if config.search == "grid":
        drawn = [name for name, domain in domains.items() if not domain.is_listed]
        return f"can't cross {', '.join(drawn)}: list the values, or set search to random" if drawn else None
    crossed = [name for name, domain in domains.items() if domain.kind == "grid"]
    if config.search == "optuna" and crossed:
        return f"takes no grid, as in {', '.join(crossed)}; write choice, or set search to random"
    return None


def _compares_nothing(config: "SweepConfig") -> str | None:
    if config.space and config.num_trials() == 1:
        return "one trial compares nothing; say how many to try"
    return None


def _no_population(config: "SweepConfig") -> str | None:
    if config.scheduler != "pbt":
        return None
    if config.search != "random":
        return "pbt draws its own values while it trains; set search to random"
    if config.space and config.num_trials() < 2:
        return "pbt needs at least two trials to learn from each other; raise num_samples"
    if config.space and not config.evolved():
        return (
            "pbt needs a setting that may change in the middle of a run, and the space has none; "
            f"add one of {', '.join(sorted(EVOLVABLE))}"
        )
    return None


def _no_time(config: "SweepConfig") -> str | None:
    return "no time at all; write a longer one, or leave it out" if config.time_budget_s == 0 else None


@dataclass
class SweepConfig(Section):
    """What is searched and how. Progress is counted in epochs, or in steps where those decide about validations."""

    space: Space = field(default_factory=dict)
    """Settings to vary, `training.NAME` or `model.NAME`, and the values of each."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How values are picked; grid tries every combination of listed values, optuna learns from earlier trials."""
    num_samples: Count = 1
    """Trials; with a grid, times each point of it is tried. The population of pbt."""
    metric: Text | None = None
    """Metric that compares trials, such as val_accuracy. None: `training.monitor`."""
    mode: Literal["min", "max"] | None = None
    """Whether a small or a large value is better. None: what suits the metric."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Who ends trials early (asha, median), or lets them continue from better ones with other settings (pbt)."""
    grace_period: Count = 1
    """Epochs (or steps) that each trial gets before it may be ended early."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """Of so many trials asha lets one go on, each time that the training has become so many times longer."""
    min_trials: Count = 3
    """Other trials that median compares with before it ends one."""
    perturbation_interval: Count = 1
    """Epochs (or steps) between two times at which pbt looks whether a trial should take over a better one."""
    quantile_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Part of the trials that takes over, and part that is taken over from (pbt)."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How often a setting is drawn anew when a trial takes over, instead of being changed a little (pbt)."""
    max_concurrent_trials: Count | None = None
    """Trials at the same time. None: as many as the cluster has room for."""
    time_budget: Positive | Duration | None = None
    """Time over all starts, in seconds or as "HH:MM:SS", after which the sweep ends as it is. None: no limit."""
    seed: CountOrZero = 0
    """Start of the search's own randomness; each trial's values follow from it and the trial's number."""

    other_names: ClassVar[Mapping[str, str]] = {
        theirs: ours for ours, names in _SYNONYMS.items() for theirs in names.split()
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(("space",), _unusable_space),
        Rule(("search", "space"), lambda config: None if _unusable_space(config) else _searched_otherwise(config)),
        Rule(("num_samples", "space"), lambda config: None if _unusable_space(config) else _compares_nothing(config)),
        Rule(("scheduler", "space", "search"), lambda c: None if _unusable_space(c) else _no_population(c)),
        Rule(("time_budget",), _no_time),
    )

    @property
    def time_budget_s(self) -> float | None:
        """`time_budget` in seconds."""
        return TrainingConfig(max_time=self.time_budget).max_time_s

    def domains(self) -> dict[str, Domain]:
        """The space, read."""
        return {name: read_domain(notation) for name, notation in self.space.items()}

    def crossed(self) -> dict[str, Domain]:
        """The part of the space of which each combination is tried."""
        is_grid = self.search == "grid"
        return {name: domain for name, domain in self.domains().items() if is_grid or domain.kind == "grid"}

    def evolved(self) -> dict[str, Domain]:
        """The part of the space that pbt changes while it trains; the rest goes with the checkpoint."""
        return {name: domain for name, domain in self.domains().items() if name in EVOLVABLE}

    def num_trials(self) -> int:
        """How many trials the sweep has."""
        count = self.num_samples
        for domain in self.crossed().values():
            count *= len(domain.values)
        return count

    def missing_package(self) -> str | None:
        """What has to be installed before this can be searched; a run without a sweep does not need it."""
        if self.search == "optuna" and importlib.util.find_spec("optuna") is None:
            return "sweep.search = optuna: the package is not installed. Use: pip install 'ray-trainer[sweep]'"
        return None

    def objective(self, training: TrainingConfig) -> tuple[str, Literal["min", "max"]]:
        """The metric and its mode, where the configuration leaves them to the training section or to the metric."""
        metric = (self.metric or training.monitor).replace("/", "_")
        if self.mode is not None:
            return metric, self.mode
        if metric == training.monitor:
            return metric, training.mode
        smaller = replace(training, monitor=metric, mode="min")
        return metric, "max" if any(problem.name == "mode" for problem in smaller.problems()) else "min"


def cross_problems(sweep: SweepConfig, model: Mapping[str, Any], training: TrainingConfig) -> str | None:
    """What is wrong with a space in view of what it changes; asked when each section is right by itself."""
    if not sweep.space or sweep.problems():
        return None
    problems = [f"{name}: {_absent(name, model)}" for name in sweep.space if _absent(name, model)]
    metric, mode = sweep.objective(training)
    problems += (
        f"metric {metric} with mode {mode}: {problem.message}"
        for problem in replace(training, monitor=metric, mode=mode).problems()
    )
    return "; ".join(problems) or None


def _absent(name: str, model: Mapping[str, Any]) -> str | None:
    """A name in `model` that is misspelt would be set and never read, so it must be there already."""
    section, *path = name.split(".")
    place: Any = model
    for depth, key in enumerate(path if section == "model" else ()):
        if not isinstance(place, Mapping) or key not in place:
            names = [str(other) for other in place] if isinstance(place, Mapping) else []
            reached = ".".join(["model", *path[: depth + 1]])
            return f"`model` has no {reached}{did_you_mean(key, names)}; give it a value there as well"
        place = place[key]
    return None
