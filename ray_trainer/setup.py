"""What is decided and checked before a run begins, so that nothing wrong is found after something was written."""

import logging
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import LoadedCheckpoint, Tier
from ray_trainer.config import TrainingConfig
from ray_trainer.continuation import DataChange, accept_changes, data_record, saved_progress
from ray_trainer.data import UniversalDataModule
from ray_trainer.data.batch import BatchPlan, to_device
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.data.quarantine import BadDataPolicy
from ray_trainer.data.source import BatchSource
from ray_trainer.errors import ConfigError, DataError, RayTrainerError
from ray_trainer.initial import InitialWeights
from ray_trainer.journal import Journal
from ray_trainer.seeding import isolated_rng
from ray_trainer.shortage import explained, is_shortage
from ray_trainer.state import Progress
from ray_trainer.task import Task, TaskSpec
from ray_trainer.users_code import users_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Where a run ends.

    Attributes:
        epochs: number of epochs.
        max_steps: number of steps, whatever the epochs.
        max_time_s: seconds of training over all attempts.
        steps_per_epoch: None where the data has no length.
        total_steps: of the whole run, where they are known.
    """

    epochs: int
    max_steps: int | None
    max_time_s: float | None
    steps_per_epoch: int | None
    total_steps: int | None

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int | None, progress: Progress) -> "Limits":
        """Those of a configuration; ``fast_dev_run`` is one epoch.

        What was done counts as it was done: epochs may have had another length, or have been started twice, where
        the data changed. Otherwise the total is the same at each point of a run.
        """
        epochs = 1 if config.fast_dev_run else config.epochs
        by_epochs = None
        if steps_per_epoch is not None:
            of_this_epoch = 0 if progress.epoch_logged else max(0, steps_per_epoch - progress.step_in_epoch)
            by_epochs = progress.step + of_this_epoch + max(0, epochs - progress.epoch - 1) * steps_per_epoch
        known = [steps for steps in (by_epochs, config.max_steps) if steps is not None]
        return cls(epochs, config.max_steps, config.max_time_s, steps_per_epoch, min(known) if known else None)

    def reached(self, progress: Progress) -> bool:
        """Whether there is nothing left to train."""
        return (
            progress.stop_reason is not None
            or progress.epoch + int(progress.epoch_logged) >= self.epochs
            or (self.max_steps is not None and progress.step >= self.max_steps)
            or (self.max_time_s is not None and progress.elapsed_s >= self.max_time_s)
        )

    def ends_epoch(self, progress: Progress) -> bool:
        """Whether no step of the epoch is left: it may have become shorter than what was done of it."""
        return self.steps_per_epoch is not None and progress.step_in_epoch >= self.steps_per_epoch


@dataclass(frozen=True)
class Sources:
    """Where batches come from.

    Attributes:
        train: this rank's part of each step.
        val: this rank's part of validation, or None.
        micro_batches_a_step: of each rank, in a full step.
        batch_size: samples of a micro-batch.
    """

    train: BatchSource
    val: BatchSource | None
    micro_batches_a_step: int
    batch_size: int

    @classmethod
    def of(cls, config: TrainingConfig, data: UniversalDataModule, global_batch_size: int) -> "Sources":
        """Those of a run's data."""
        plan = train_plan(config, global_batch_size)
        val = data.val_source(validation_plan(config))
        return cls(data.train_source(plan), val, plan.micro_batches_a_step, config.batch_size)


@dataclass(frozen=True)
class Setup:
    """What was decided.

    Attributes:
        sources: where batches come from.
        limits: where the run ends.
        monitor: the metric that says which checkpoint is best.
        global_batch_size: samples of a step over all ranks.
        data: what is recorded of the data, by split.
        data_changes: how it differs from that of the checkpoint.
        initial: the weights that a new run starts with, if they come from another one.
    """

    sources: Sources
    limits: Limits
    monitor: str
    global_batch_size: int
    data: dict[str, Any]
    data_changes: tuple[DataChange, ...] = ()
    initial: InitialWeights | None = None

    @property
    def restarts_epoch(self) -> bool:
        """Whether the epoch in progress starts again from its first sample."""
        return any(change.restarts_epoch for change in self.data_changes)

    def tell(self, journal: Journal, progress: Progress) -> None:
        """Record what is particular about the data and the beginning, once in a run."""
        if self.initial is not None:
            journal.event_once("initialised", progress.step, progress.epoch, **asdict(self.initial))
        for change in self.data_changes:
            journal.event_once("data_changed", progress.step, progress.epoch, **asdict(change))
        for split, source in (("train", self.sources.train), ("val", self.sources.val)):
            left_out = getattr(source, "left_out", None)
            if left_out is not None:
                journal.event_once("data_quarantined", split=split, **left_out.to_dict())


def decide(
    config: TrainingConfig,
    sources: Sources,
    global_batch_size: int,
    saved: LoadedCheckpoint | None,
    metric_names: tuple[str, ...],
) -> Setup:
    """Everything that follows from the configuration, the data and the checkpoint.

    Raises:
        ConfigError: the monitored metric does not exist.
        StateMismatchError: the run cannot go on from the checkpoint.
    """
    record = data_record(sources.train, sources.val)
    changes = tuple(accept_changes(saved.manifest if saved else None, config, record))
    monitor = choose_monitor(config, metric_names, sources.val is not None)
    progress, length = saved_progress(saved), sources.train.steps_per_epoch()
    limits = Limits.of(config, length, progress)
    if limits.reached(progress):
        changes = ()  # nothing will be trained on the data
    elif any(change.restarts_epoch for change in changes):
        progress.restart_epoch()
        limits = Limits.of(config, length, progress)
    return Setup(sources, limits, monitor, global_batch_size, record, changes)


def bad_data_policy(config: TrainingConfig, task_spec: TaskSpec | None, collate_fn: Any) -> BadDataPolicy:
    """What is done with bad rows; only the columns that the task names are searched, where it does."""
    names_columns = task_spec is not None and task_spec.input_fields and collate_fn is None
    columns = frozenset([*task_spec.input_fields, task_spec.target_field]) if task_spec and names_columns else None
    return BadDataPolicy(config.on_bad_data, config.max_bad_ratio, columns)


def choose_global_batch_size(config: TrainingConfig, saved: LoadedCheckpoint | None) -> int:
    """Samples of one step over all ranks; that of the checkpoint where the configuration leaves it open.

    A run that goes on from a survivor has decided before, and may have fewer ranks than it is meant to have.

    Raises:
        ConfigError: it is given, and differs from the checkpoint's or from what else is given.
    """
    kept = saved.manifest.global_batch_size if saved else None
    if saved is not None and saved.tier is Tier.SURVIVOR and kept is not None:
        return kept
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
    if kept is None or kept == wanted:
        return wanted
    if given is not None:
        raise ConfigError(
            f"global_batch_size ({given}) differs from the checkpoint's ({kept}), so steps would take other samples. "
            f"Set it to {kept} or leave it out to continue, or start a new run."
        )
    logger.warning(
        "The run keeps its global batch of %d samples; %d worker%s of batch_size %d would make it %d.",
        kept,
        ranks,
        "s" if ranks > 1 else "",
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
        deals_whole=config.determinism == "elastic",
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


def try_first_batch(
    task: Task, model: nn.Module, device: torch.device, sources: Sources, may_need_less: bool = False
) -> None:
    """Run the first batch of each source through model and loss, without a trace in either.

    Args:
        task: reads a batch.
        model: on the device.
        device: where batches go.
        sources: of training and validation.
        may_need_less: memory that does not suffice is no error here, because training can do with less.

    Raises:
        DataError: data and model do not fit; says what does not.
        MemoryShortageError: they do not fit into memory.
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
        if is_shortage(error):
            if may_need_less:
                return
            raise explained(error, "the first batch", sources.batch_size, model) from error
        raise DataError(
            f"The first batch fails in the model or the loss: {_sentence(error)}{users_line(error)}. Compare what the "
            "data gives with what the model takes and returns."
        ) from error
    finally:
        model.train(was_training)


def _sentence(error: Exception) -> str:
    """Type and message, without the full stop."""
    return f"{type(error).__name__}: {error}".rstrip(": .")


def _try(task: Task, model: nn.Module, device: torch.device, source: BatchSource) -> None:
    for step_batch in islice(source.steps(epoch=0), 1):
        batch = to_device(step_batch.micro_batches[0], device)
        task.check_first_batch(batch)
        task.evaluate(model, batch)
        if isinstance(source, OrderedSource):
            task.check_all_labels(model, batch, source.column)
