"""What is decided and checked before a run begins, so that nothing wrong is found after something was written."""

import logging
import traceback
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import Manifest
from ray_trainer.config import TrainingConfig
from ray_trainer.data.batch import BatchPlan, to_device
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.data.source import BatchSource
from ray_trainer.errors import ConfigError, DataError, RayTrainerError, StateMismatchError
from ray_trainer.seeding import isolated_rng
from ray_trainer.state import Progress
from ray_trainer.task import Task

logger = logging.getLogger(__name__)

#: Settings that say where and how often a run is looked at, not what it computes.
_WITHOUT_EFFECT = {
    "checkpoint_dir", "save_every_n_epochs", "save_every_n_steps", "save_every_minutes", "keep_last_n",
    "keep_best_k", "log_every_n_steps", "tensorboard", "run_name", "notes", "max_time", "num_loader_workers",
}  # fmt: skip
#: Settings that decide which samples a step takes: another value is another run.
_OF_THE_ORDER = ("random_seed", "shuffle", "drop_last", "limit_train_batches", "validation_split")


@dataclass(frozen=True)
class Limits:
    """Where a run ends.

    Attributes:
        epochs: number of epochs.
        max_steps: number of steps, whatever the epochs.
        max_time_s: seconds of training over all attempts.
        steps_per_epoch: None where the data has no length.
    """

    epochs: int
    max_steps: int | None
    max_time_s: float | None
    steps_per_epoch: int | None

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int | None) -> "Limits":
        """Those of a configuration; ``fast_dev_run`` is one epoch."""
        epochs = 1 if config.fast_dev_run else config.epochs
        return cls(epochs, config.max_steps, config.max_time_s, steps_per_epoch)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, where they are known."""
        by_epochs = None if self.steps_per_epoch is None else self.steps_per_epoch * self.epochs
        known = [steps for steps in (by_epochs, self.max_steps) if steps is not None]
        return min(known) if known else None

    def reached(self, progress: Progress) -> bool:
        """Whether there is nothing left to train."""
        return (
            progress.stop_reason is not None
            or progress.epoch + int(progress.epoch_logged) >= self.epochs
            or (self.max_steps is not None and progress.step >= self.max_steps)
            or (self.max_time_s is not None and progress.elapsed_s >= self.max_time_s)
        )

    def ends_epoch(self, progress: Progress) -> bool:
        """Whether the last completed step was the epoch's last."""
        return progress.step_in_epoch == self.steps_per_epoch


@dataclass(frozen=True)
class Sources:
    """Where batches come from.

    Attributes:
        train: this rank's part of each step.
        val: this rank's part of validation, or None.
        micro_batches_a_step: of each rank, in a full step.
    """

    train: BatchSource
    val: BatchSource | None
    micro_batches_a_step: int


@dataclass(frozen=True)
class Setup:
    """What was decided.

    Attributes:
        sources: where batches come from.
        limits: where the run ends.
        monitor: the metric that says which checkpoint is best.
        global_batch_size: samples of a step over all ranks.
    """

    sources: Sources
    limits: Limits
    monitor: str
    global_batch_size: int


def choose_global_batch_size(config: TrainingConfig, saved: Manifest | None) -> int:
    """Samples of one step over all ranks; that of the checkpoint where the configuration leaves it open.

    Raises:
        ConfigError: it is given, and differs from the checkpoint's or from what else is given.
    """
    ranks = distributed.world_size()
    implied = config.batch_size * config.gradient_accumulation_steps * ranks
    given = config.global_batch_size
    if given is not None and config.gradient_accumulation_steps > 1 and given != implied:
        raise ConfigError(
            f"global_batch_size ({given}) is not batch_size ({config.batch_size}) x gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps}) x number of workers ({ranks}) = {implied}. Leave one of them out; "
            "accumulation follows from the global batch."
        )
    wanted = given or implied
    kept = saved.global_batch_size if saved else None
    if kept is None or kept == wanted:
        return wanted
    if given is not None:
        raise ConfigError(
            f"global_batch_size ({given}) differs from the checkpoint's ({kept}), so steps would take other samples. "
            f"Set it to {kept} or leave it out to continue, or start a new run."
        )
    logger.warning(
        "The run keeps its global batch of %d samples; %d workers of batch_size %d would make it %d.",
        kept,
        ranks,
        config.batch_size,
        implied,
    )
    return kept


def train_plan(config: TrainingConfig, global_batch_size: int) -> BatchPlan:
    """How training samples are dealt out."""
    plan = BatchPlan(
        batch_size=config.batch_size,
        global_batch_size=global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.random_seed,
        shuffle=config.shuffle,
        drop_last=config.drop_last,
        num_loader_workers=config.num_loader_workers,
        limit_batches=config.limit_train_batches,
    )
    return replace(plan, limit_batches=plan.micro_batches_a_step) if config.fast_dev_run else plan


def validation_plan(config: TrainingConfig) -> BatchPlan:
    """How validation samples are dealt out: a micro-batch a rank."""
    ranks = distributed.world_size()
    plan = train_plan(config, config.batch_size * ranks)
    limit = 1 if config.fast_dev_run else config.limit_val_batches
    return replace(plan, shuffle=False, drop_last=False, limit_batches=limit)


def choose_monitor(config: TrainingConfig, metric_names: tuple[str, ...], validates: bool) -> str:
    """The configured metric; ``train_loss`` in place of the default where there is no validation data.

    Raises:
        ConfigError: the run will not have that metric.
    """
    if not validates and config.monitor == TrainingConfig().monitor:
        return "train_loss"
    splits = ("train", "val") if validates else ("train",)
    available = [f"{split}_{name}" for split in splits for name in ("loss", *metric_names)]
    if config.monitor not in available:
        why = "" if validates else ", because it has no validation data"
        raise ConfigError(
            f"monitor ({config.monitor!r}) is no metric of this run{why}. Use one of {', '.join(available)}."
        )
    return config.monitor


def refuse_changes(saved: Manifest | None, config: TrainingConfig, fingerprint: str) -> None:
    """Compare a run with its checkpoint: what cannot be continued is refused, other differences are told.

    Raises:
        StateMismatchError: data, or settings that decide the order of samples, are not what they were.
    """
    if saved is None:
        return
    now = config.to_dict()
    changed = {
        name: (old, now[name])
        for name, old in saved.config.items()
        if name in now and _plain(old) != _plain(now[name]) and name not in _WITHOUT_EFFECT
    }
    problems = [
        f"{name} was {changed[name][0]!r} and is {changed[name][1]!r}" for name in _OF_THE_ORDER if name in changed
    ]
    if "optimizer" in changed:
        problems.append(
            "the optimizer was {!r} and is {!r}, which cannot take over its state".format(*changed["optimizer"])
        )
    if saved.data_fingerprint and saved.data_fingerprint != fingerprint:
        problems.append("the training data is not the data that the run was started with")
    if problems:
        raise StateMismatchError(
            "The run cannot be continued, because its steps would not be the same: " + "; ".join(problems) + ". "
            "Bring back what was there, or start a new run under another name or directory."
        )
    for name, (old, new) in changed.items():
        logger.warning("%s was %r when the checkpoint was written and is %r now.", name, old, new)
    threads = torch.get_num_threads()
    if saved.num_threads != threads:
        logger.warning(
            "The checkpoint was computed with %d threads, this is %d: bits may differ.",
            saved.num_threads,
            threads,
        )


def try_first_batch(task: Task, model: nn.Module, device: torch.device, sources: Sources) -> None:
    """Run the first batch of each source through model and loss, without a trace in either.

    Raises:
        DataError: data and model do not fit; says what does not.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), isolated_rng():
            for source in (sources.train, sources.val):
                if source is not None and source.is_repeatable:
                    _try(task, model, device, source)
    except (RayTrainerError, OSError):
        raise
    except Exception as error:  # the user's model may raise anything, and none of it gets better by waiting
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"The first batch fails in the model or the loss: {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno}: {last.line}). Compare what the data gives with what the model "
            "takes and returns."
        ) from error
    finally:
        model.train(was_training)


def _try(task: Task, model: nn.Module, device: torch.device, source: BatchSource) -> None:
    for step_batch in islice(source.steps(epoch=0), 1):
        batch = to_device(step_batch.micro_batches[0], device)
        task.check_first_batch(batch)
        task.evaluate(model, batch)
        if isinstance(source, OrderedSource):
            task.check_all_labels(model, batch, source.column)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
