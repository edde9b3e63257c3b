"""What Ray runs on every worker, at every start: the first one, a restart and a resume are the same."""

import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from ray_trainer import distributed
from ray_trainer.checkpoint import SurvivorTier
from ray_trainer.cluster.events import final_error
from ray_trainer.cluster.rejoin import Rejoining
from ray_trainer.cluster.retries import note_place
from ray_trainer.cluster.runtime import RayRuntime
from ray_trainer.cluster.vault import RayVault
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import ConfigError, RayTrainerError
from ray_trainer.metrics import saved_checkpoints
from ray_trainer.pulse.deadlines import Terms
from ray_trainer.runtime import Stop
from ray_trainer.seeding import set_random_seed
from ray_trainer.storage.snapshots import ProcessMemory
from ray_trainer.task import Experiment
from ray_trainer.trainer import Trainer
from ray_trainer.users_code import users_line

_SWITCH_EVERY_S = 0.0005  # between threads, while one of them imports: others wait for messages


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; travels from the driver by pickle.

    Attributes:
        experiment: the user's functions.
        training: how to train.
        model_config: reaches ``build_model`` as a `SimpleNamespace`.
        datasets: ``train`` and maybe ``val``, indexed or map-style.
        description: the sections of ``run.yaml`` beside ``training``.
        torch_threads: of each worker; bits depend on it.
        link: to the driver.
        vault: for snapshots in memory.
        lease: the driver's, on the run's directory; 0 where nothing is going to be written.
        hang: when a worker counts as hung; None for never.
        start_from: a checkpoint of another run, for as long as this one has none of its own.
        has_room: whether workers on some nodes find room when some nodes are left.
        rejoining: how workers find each other again; None if all are started again when one dies.
    """

    experiment: Experiment
    training: TrainingConfig
    model_config: dict[str, Any]
    datasets: dict[str, Any]
    description: dict[str, Any]
    torch_threads: int
    link: ActorHandle | None
    vault: RayVault | None
    lease: int
    hang: Terms | None
    has_room: Callable[[Sequence[str], Collection[str]], bool]
    start_from: str | None = None
    rejoining: Rejoining | None = None


@dataclass(frozen=True)
class Outcome:
    """What a worker returns: results, or an error that a restart would only repeat."""

    results: dict[str, Any] | None
    error: RayTrainerError | None
    stop: Stop


def train_worker(config: dict[str, Any]) -> Outcome:
    """Train as one of the ranks. Collective over all workers of the run.

    An error that is the same on all ranks and at every attempt is returned, so that Ray does not try again;
    any other is raised, and Ray restarts the workers.
    """
    job: Job = config["job"]
    for handler in (*logging.getLogger().handlers, *logging.getLogger("ray.train").handlers):
        handler.addFilter(_without_rays_lines)
    torch.set_num_threads(job.torch_threads)
    imports = _begin_imports()
    datasets = cache(lambda: {name: _open(data) for name, data in job.datasets.items()})  # not by a spare

    def train(survivor: ProcessMemory | None) -> Outcome:
        with distributed.membership():
            if survivor is not None:
                shared = SurvivorTier(survivor).share()  # a newcomer gets it while it imports
                if survivor.stop and shared is None:
                    return Outcome(results=None, error=None, stop=Stop(survivor.stop))  # there is nothing to save
            imports.join()
            return _train(job, datasets(), survivor)

    def warm_up() -> None:
        imports.join()
        _warm_up(job)

    return train(None) if job.rejoining is None else job.rejoining.run(train, warm_up)


def _begin_imports() -> threading.Thread:
    """Import beside what else there is to do; it has to be joined before code of the user runs, which imports as well.

    `DistributedDataParallel` and the optimizer import ``torch._dynamo``, which takes as long as torch itself.
    """
    before_s = sys.getswitchinterval()

    def work() -> None:
        with suppress(Exception):  # it comes again when it is needed, and is told then
            importlib.import_module("torch._dynamo")
        sys.setswitchinterval(before_s)

    sys.setswitchinterval(_SWITCH_EVERY_S)
    imports = threading.Thread(target=work, name="ray-trainer-imports", daemon=True)
    imports.start()
    return imports


def _warm_up(job: Job) -> None:
    """Have everything imported that the first model of a process imports, the user's code included."""
    with suppress(Exception):  # it comes again when the model is needed, and is told then
        set_random_seed(job.training.random_seed)
        job.experiment.build_model(SimpleNamespace(**job.model_config))


def _train(job: Job, datasets: dict[str, Any], survivor: ProcessMemory | None) -> Outcome:
    runtime = RayRuntime(job.link, job.description, job.lease, job.vault, job.hang, job.has_room, survivor)
    trainer: Trainer | None = None
    is_alone = distributed.world_size() == 1
    try:
        trainer = _build_trainer(job, runtime)
        results = trainer.train(datasets["train"], datasets.get("val"), resume_from=_origin(trainer, job))
    except Exception as error:
        if isinstance(error, RayTrainerError) and (error.on_all_ranks or is_alone) and final_error(error) is not None:
            return Outcome(results=None, error=error, stop=Stop.NONE)
        note_place(error, traceback.format_exc(), trainer.progress.step if trainer else 0)
        raise
    return Outcome(results=results, error=None, stop=runtime.stopped)


def _without_rays_lines(record: logging.LogRecord) -> bool:
    """Ray Train prints each report of each worker, and each error with its traceback; both are events of ours."""
    return f"{os.sep}ray{os.sep}train{os.sep}" not in record.pathname


def _origin(trainer: Trainer, job: Job) -> str:
    """What training goes on from: the run's own newest checkpoint once it has saved, else the one it was given.

    Collective.
    """
    if job.start_from is None:
        return "auto"
    with distributed.same_error_everywhere():
        has_own = distributed.rank() == 0 and (
            bool(trainer.checkpoint_manager.records()) or bool(saved_checkpoints(trainer.runtime.storage))
        )
    return "auto" if distributed.broadcast_object(has_own) else job.start_from


def _open(data: Any) -> Any:
    return ray.get(data) if isinstance(data, ray.ObjectRef) else data


def _build_trainer(job: Job, runtime: RayRuntime) -> Trainer:
    experiment = job.experiment
    config = SimpleNamespace(**job.model_config)
    with distributed.same_error_everywhere(), users_code("build_model, build_optimizer and build_hooks"):
        set_random_seed(job.training.random_seed)
        model = experiment.build_model(config)
        optimizer = experiment.build_optimizer(model, job.training) if experiment.build_optimizer else None
        hooks = experiment.build_hooks() if experiment.build_hooks else None
    return Trainer(
        model,
        config,
        job.training,
        experiment.task_spec,
        hooks,
        optimizer=optimizer,
        data_collator=experiment.collate_fn,
        runtime=runtime,
    )


@contextmanager
def users_code(names: str) -> Iterator[None]:
    """Turn an error in the experiment's own functions into one that says where it happened.

    Raises:
        ConfigError: instead of whatever the functions raised.
    """
    try:
        yield
    except RayTrainerError:
        raise
    except Exception as error:  # the user's code may raise anything, and none of it is worth a restart
        raise ConfigError(
            f"The experiment's functions failed with {type(error).__name__}: {error}{users_line(error)}. "
            f"Check {names}, and the values of `model`."
        ) from error
