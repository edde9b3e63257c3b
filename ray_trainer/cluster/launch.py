"""`fit`: from an experiment and its configuration to a `TorchTrainer`, and from its end to a result."""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from ray_trainer.cluster.config import ClusterConfig, useless_with
from ray_trainer.cluster.events import FailureRecorder, record
from ray_trainer.cluster.files import DataFiles
from ray_trainer.cluster.groups import recorders
from ray_trainer.cluster.link import open_link
from ray_trainer.cluster.monitor import terms_of
from ray_trainer.cluster.readiness import require_cluster, require_storage
from ray_trainer.cluster.rejoin import Rejoining, may_shrink, open_rendezvous, rejoins
from ray_trainer.cluster.replacement import InPlaceConfig, ReplacementGuard
from ray_trainer.cluster.resizing import LOOKS_EVERY_S, guards
from ray_trainer.cluster.retries import Retries
from ray_trainer.cluster.session import (
    has_room_elsewhere,
    ray_session,
    require_resources,
    resources_per_worker,
    torch_threads,
    worker_bounds,
)
from ray_trainer.cluster.shards import index_ray_dataset
from ray_trainer.cluster.storage import filesystem_for_ray, owned
from ray_trainer.cluster.supervisor import run_to_end
from ray_trainer.cluster.termination import listeners
from ray_trainer.cluster.vault import RayVault, open_keeper
from ray_trainer.cluster.watching import Display, NoDisplay, Watch, user
from ray_trainer.cluster.worker import Job, train_worker, users_code
from ray_trainer.config import TrainingConfig
from ray_trainer.config.schema import Section
from ray_trainer.data.quarantine import BadDataPolicy, checked
from ray_trainer.errors import ConfigError
from ray_trainer.runtime import raise_interruption
from ray_trainer.setup import bad_data_policy
from ray_trainer.storage import Storage
from ray_trainer.task import Experiment


@dataclass(frozen=True)
class FitResult:
    """What a finished run gives back.

    Attributes:
        results: the dict of `Trainer.train`.
        run_dir: where everything about the run lies, a path or URI.
        checkpoint: the best one, else the newest; None if the run keeps none.
    """

    results: dict[str, Any]
    run_dir: str
    checkpoint: ray.train.Checkpoint | None


def fit(
    experiment: Experiment,
    training_config: TrainingConfig,
    cluster_config: ClusterConfig | None = None,
    model_config: Mapping[str, Any] | None = None,
    *,
    display: Display | None = None,
    take_over: bool = False,
) -> FitResult:
    """Train on a Ray cluster; a run of the same name and storage path is continued.

    Without an address, Ray is started on this machine for this run. Ctrl-C and SIGTERM save a checkpoint of the
    last completed step first, if this is the main thread.

    Args:
        experiment: what is trained, on what.
        training_config: how.
        cluster_config: where; one worker on this machine by default.
        model_config: reaches ``build_model`` and ``build_datasets`` as a `SimpleNamespace`.
        display: shows the run while it lasts.
        take_over: do not ask whether another driver is at work on the run; it can't save any more then.

    Raises:
        ConfigError: a configuration or one of the experiment's functions is wrong.
        DataError: the data cannot be trained on.
        LeaseHeldError: another driver is at work on the run; nothing was written.
        LeaseLostError: another driver has taken the run over.
        RunError: the workers failed again and again without progress, or twice at the same place.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
        SystemExit: with 143 after SIGTERM, once the checkpoint is written.
    """
    cluster = _named(cluster_config or ClusterConfig(), training_config)
    watching = user(display or NoDisplay())
    return fit_watched(experiment, training_config, cluster, dict(model_config or {}), watching, take_over=take_over)


def fit_watched(
    experiment: Experiment,
    training_config: TrainingConfig,
    cluster: ClusterConfig,
    model_values: dict[str, Any],
    watching: AbstractContextManager[Watch],
    start_from: str | None = None,
    take_over: bool = False,
) -> FitResult:
    """As `fit`, for whoever is watching.

    Args:
        experiment: as in `fit`.
        training_config: as in `fit`.
        cluster: with a name.
        model_values: as in `fit`.
        watching: entered once Ray runs.
        start_from: a checkpoint of another run, with which this one starts as long as it has none of its own.
        take_over: as in `fit`.
    """
    validate_sections(training=training_config, cluster=cluster)
    useless = useless_with(training_config, cluster)
    if useless is not None:
        raise ConfigError(f"cluster.spare_workers = {cluster.spare_workers}: {useless}.")
    storage = Storage.open(cluster.storage_path).child(str(cluster.name))
    require_storage(storage)
    require_cluster(cluster)
    is_new = not storage.exists()
    with owned(storage, training_config, take_over) as storage, ray_session(cluster):
        require_resources(cluster)
        link = open_link()
        is_in_place = rejoins(cluster, training_config)
        job = Job(
            experiment=experiment,
            training=_with_fixed_global_batch(training_config, cluster, is_in_place),
            model_config=model_values,
            datasets=build_datasets(experiment, model_values, training_config),
            description={"model": model_values, "cluster": cluster.to_dict()},
            torch_threads=torch_threads(cluster),
            link=link,
            vault=_open_vault(cluster),
            lease=storage.fence.epoch,
            hang=terms_of(cluster),
            has_room=partial(has_room_elsewhere, cluster),
            start_from=start_from,
        )
        retries = Retries(cluster.max_failures)
        with watching as watch:
            trainer = partial(_torch_trainer, job, cluster, storage, is_in_place)
            outcome = run_to_end(trainer, storage, link, watch, retries)
    if outcome.results is None and is_new and not storage.exists("events.jsonl"):
        storage.delete()  # only Ray's marker is in there
    if outcome.error is not None:
        raise outcome.error
    raise_interruption(outcome.stop)
    assert outcome.results is not None
    return FitResult(outcome.results, storage.uri, _checkpoint(outcome.results, storage))


def _open_vault(cluster: ClusterConfig) -> RayVault | None:
    every_n_steps = cluster.snapshot_every_n_steps
    return None if every_n_steps is None else RayVault(open_keeper(), every_n_steps)


def _named(cluster: ClusterConfig, training: TrainingConfig) -> ClusterConfig:
    if cluster.name is not None:
        return cluster
    return replace(cluster, name=f"{training.run_name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")


def validate_sections(**sections: Section) -> None:
    """Check several sections.

    Raises:
        ConfigError: lists every error of each.
    """
    problems = []
    for section, config in sections.items():
        try:
            config.validate()
        except ConfigError as error:
            problems.append(f"[{section}] {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _with_fixed_global_batch(training: TrainingConfig, cluster: ClusterConfig, is_in_place: bool) -> TrainingConfig:
    """A run whose number of workers may change takes the global batch of the greatest number."""
    least, most = worker_bounds(cluster)
    may_change = least != most or (is_in_place and may_shrink(training))
    if not may_change or training.global_batch_size is not None:
        return training
    total = training.batch_size * training.gradient_accumulation_steps * most
    return replace(training, global_batch_size=total, gradient_accumulation_steps=1)


def build_datasets(experiment: Experiment, model_values: dict[str, Any], training: TrainingConfig) -> dict[str, Any]:
    """The experiment's datasets, in a form that travels to workers.

    Raises:
        ConfigError: its function failed, or returned something else.
    """
    with users_code("build_datasets"):
        datasets = dict(experiment.build_datasets(SimpleNamespace(**model_values), training))
    unknown = sorted(datasets.keys() - {"train", "val"})
    if "train" not in datasets or unknown:
        raise ConfigError(
            f"build_datasets returned the datasets {sorted(datasets)}. It must return a dict with 'train' and, "
            "if there is validation data, 'val'."
        )
    policy = bad_data_policy(training, experiment.task_spec, experiment.collate_fn)
    return {name: _portable(data, policy) for name, data in datasets.items() if data is not None}


def _portable(data: Any, policy: BadDataPolicy) -> Any:
    """The dataset in a form that every worker can open: an index of blocks, or a reference."""
    if not isinstance(data, ray.data.Dataset | DataFiles):
        return ray.put(data)
    if isinstance(data, DataFiles):
        with users_code("build_datasets"):
            blocks = data.index(policy)
    else:
        blocks = index_ray_dataset(data, policy=policy)
    checked(blocks, policy)  # told before workers are started; they leave the same rows out
    return blocks


def _rejoining(cluster: ClusterConfig, training: TrainingConfig) -> Rejoining:
    num_ranks, num_spares = worker_bounds(cluster)[0], cluster.spare_workers
    actor = open_rendezvous(num_ranks, num_spares, may_shrink(training))
    return Rejoining(actor, num_ranks, num_spares, cluster.collective_timeout_s, cluster.hang_floor_s is not None)


def _torch_trainer(
    job: Job, cluster: ClusterConfig, storage: Storage, is_in_place: bool
) -> tuple[TorchTrainer, Rejoining | None]:
    """What a start needs: workers that an earlier one has left behind do not meet those of this one."""
    rejoining = _rejoining(cluster, job.training) if is_in_place else None
    job = replace(job, rejoining=rejoining)
    configure_torch = TorchConfig if rejoining is None else InPlaceConfig
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=configure_torch(
            backend="cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo",
            timeout_s=math.ceil(cluster.collective_timeout_s),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers if rejoining is None else rejoining.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=resources_per_worker(cluster),
            placement_strategy=cluster.placement_strategy,
            elastic_resize_monitor_interval_s=LOOKS_EVERY_S,
        ),
        run_config=ray.train.RunConfig(
            name=cluster.name,
            storage_path=storage.path.rstrip("/").rpartition("/")[0],
            storage_filesystem=filesystem_for_ray(storage),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # what matters is an event of ours
            callbacks=[
                FailureRecorder(
                    storage,
                    job.link,
                    cluster.max_failures,
                    job.training.on_bad_data == "quarantine",
                    *([rejoining.ranks_of] if rejoining else []),
                ),
                *recorders(job.link),
                *listeners(),
                *(guards(storage, job.link) if isinstance(cluster.num_workers, tuple) else []),
                *([ReplacementGuard(partial(record, storage, job.link))] if rejoining else []),
            ],
        ),
    )
    return trainer, rejoining


def _checkpoint(results: dict[str, Any], storage: Storage) -> ray.train.Checkpoint | None:
    path = results["checkpoint_path"]
    if path is None:
        return None
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return ray.train.Checkpoint(path=storage.child(name).path, filesystem=storage.filesystem)
