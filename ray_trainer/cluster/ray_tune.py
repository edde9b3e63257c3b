"""Ray Tune for the time of a sweep: which trials it runs, with which scheduler, on what."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune

from ray_trainer.cluster.ledger import Ledger
from ray_trainer.cluster.overseer import Overseer, WhenOverseen
from ray_trainer.cluster.plans import SuggestedPlans, known_trials, new_plan, plan_of
from ray_trainer.cluster.room import concurrent_trials, driver_resources
from ray_trainer.cluster.schedule import build_scheduler, prime
from ray_trainer.cluster.search import open_search
from ray_trainer.cluster.sweep_config import SweepConfig
from ray_trainer.cluster.sweep_job import SweepJob
from ray_trainer.cluster.trial import TrialDriver

TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints a table whatever the verbosity
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the sweep has its own, which lets trials save first
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the ledger is what a sweep goes on from
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "120",
}


def run_trials(job: SweepJob, config: SweepConfig, ledger: Ledger, overseer: Overseer) -> None:
    """Run what is left of a sweep. What Tune keeps is thrown away: the ledger is what a sweep goes on from."""
    concurrent = concurrent_trials(job.cluster, config.max_concurrent_trials)
    takes_turns = config.scheduler == "pbt"  # a population is alive as a whole, some of it paused
    scheduler = build_scheduler(config, ledger.metric, ledger.mode)
    prime(scheduler, (trial for trial in ledger.trials.values() if trial.has_ended), ledger.metric)
    space, search_options = _trials_to_run(config, ledger)
    with tempfile.TemporaryDirectory(prefix="ray-trainer-sweep-") as directory:
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialDriver, job=job), driver_resources(concurrent if takes_turns else None)
            ),
            param_space=space,
            tune_config=tune.TuneConfig(
                **search_options,
                scheduler=scheduler,
                max_concurrent_trials=None if takes_turns else concurrent,
                reuse_actors=True,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=directory,
                verbose=0,
                callbacks=[overseer],
                stop=WhenOverseen(overseer),
                failure_config=tune.FailureConfig(max_failures=job.cluster.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


def _trials_to_run(config: SweepConfig, ledger: Ledger) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of earlier starts that have not ended, then new ones: Tune's space, and its options of the search."""
    search = open_search(config, ledger.mode, known_trials(ledger))
    unended = [trial for trial in ledger.trials.values() if not trial.has_ended]
    plans = [plan_of(trial, ledger.metric, config.scheduler) for trial in unended]
    num_trials, num_known = config.num_trials(), len(ledger.trials)
    if config.search == "optuna":
        suggested = SuggestedPlans(plans, search, num_trials, ledger)
        return {}, {"search_alg": suggested, "num_samples": len(plans) + num_trials - num_known}
    plans += [new_plan(number, search) for number in range(num_known, num_trials)]
    return {"plan": tune.grid_search(plans)}, {"num_samples": 1}


def _name_of(trial: Any) -> str:
    return str(trial.config["plan"]["name"])


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Let Tune do what it is told, and tell nothing itself."""
    added = {name: value for name, value in TUNE_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in added:
            del os.environ[name]
