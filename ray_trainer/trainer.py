"""The orchestrator: builds the parts of a training, restores them, runs them, closes them."""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ray_trainer import distributed
from ray_trainer.audience import Audience
from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, LoadedCheckpoint, MemoryTier, SurvivorTier
from ray_trainer.clearing import make_room
from ray_trainer.config import TrainingConfig
from ray_trainer.continuation import require_same_data
from ray_trainer.crashes import Crashes
from ray_trainer.data import BatchSource, UniversalDataModule
from ray_trainer.elastic import ElasticLoop
from ray_trainer.errors import ConfigError
from ray_trainer.evaluation import ValidationLoop
from ray_trainer.forward import Forward
from ray_trainer.gradients import GradientAccumulator, GradientMonitor
from ray_trainer.halving import Halving
from ray_trainer.hooks import DefaultHooks, HookCaller, ResumeRecord
from ray_trainer.initial import initialise
from ray_trainer.journal import Journal
from ray_trainer.loop import TrainingLoop
from ray_trainer.losses import LossStrategy
from ray_trainer.marks import Marks
from ray_trainer.metrics import MetricsTracker, MetricSums, saved_checkpoints
from ray_trainer.optim import (
    build_optimizer,
    build_scaler,
    build_scheduler,
    follow_config,
    follow_schedule,
    refuse_unusable,
)
from ray_trainer.ownership import owned, take_over_checkpoints
from ray_trainer.placement import Placement, place_model
from ray_trainer.recording import Books, Recorder
from ray_trainer.replicas import Replicas
from ray_trainer.rewind import Rewind
from ray_trainer.rollback import Rollback
from ray_trainer.run import Run, Safeguards
from ray_trainer.runtime import LocalRuntime, Runtime, Stop
from ray_trainer.saving import Saver
from ray_trainer.seeding import deterministic_mode, set_random_seed
from ray_trainer.setup import (
    Setup,
    Sources,
    bad_data_policy,
    choose_global_batch_size,
    decide,
    try_first_batch,
)
from ray_trainer.state import Progress, Stateful, TrainState
from ray_trainer.task import Task, TaskSpec, loss_for
from ray_trainer.triggers import EarlyStopping


class Trainer:
    """Trains a model, and goes on after any interruption as if there had been none.

    It orchestrates and contains no low-level logic. The order of an epoch is fixed: start, batches,
    validation, log, save, end.

    Args:
        model: anything whose forward takes the fields of a batch; moved to the device.
        config: the model's configuration; ``pad_token_id`` is read from it if it is there.
        training_config: how to train; validated here.
        task_spec: what a batch means; language modelling without one.
        hooks: any object with some of the methods of `TrainingHooks`.
        optimizer: used as it is; else built from the configuration.
        scheduler: used as it is, advanced by each update; else built from the configuration when training starts,
            because only then the number of steps is known.
        loss_strategy: used as it is; else chosen by the task.
        tokenizer: for data that is raw text.
        data_collator: makes a batch of a list of samples.
        runtime: the surroundings; one process that writes to ``training_config.checkpoint_dir`` by default.

    Attributes:
        device: where the model is.
        task: forward, loss and metrics of a batch.
        checkpoint_manager, metrics_tracker, gradient_monitor, gradient_accumulator: the parts at work.
        progress: how far the training is.

    Raises:
        ConfigError: a `ValueError` with every error in the configuration, before anything is written.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        training_config: TrainingConfig,
        task_spec: TaskSpec | None = None,
        hooks: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        loss_strategy: LossStrategy | None = None,
        tokenizer: Any = None,
        data_collator: Any = None,
        runtime: Runtime | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}; pass an nn.Module.")
        if not isinstance(training_config, TrainingConfig):
            raise ConfigError(f"training_config is a {type(training_config).__name__}; pass a TrainingConfig.")
        training_config.validate()
        if task_spec is not None:
            if not isinstance(task_spec, TaskSpec):
                raise ConfigError(f"task_spec is a {type(task_spec).__name__}; pass a TaskSpec, or None.")
            task_spec.validate()
        refuse_unusable(model, optimizer, scheduler)
        self.hooks = DefaultHooks() if hooks is None else hooks
        self._hooks = HookCaller(self.hooks)
        self.config = config
        self.training_config = training_config
        self.task_spec = task_spec
        self.tokenizer = tokenizer
        self.data_collator = data_collator
        self.runtime = runtime or LocalRuntime(training_config.checkpoint_dir)
        self.device = self.runtime.device
        set_random_seed(training_config.random_seed)
        self.model = place_model(model, optimizer, self.device, training_config)
        pad_token_id = getattr(config, "pad_token_id", None)
        self.loss_strategy = loss_strategy or loss_for(task_spec)
        self.task = Task(task_spec, model, self.loss_strategy, pad_token_id)
        self.optimizer = optimizer or build_optimizer(model, training_config)
        self._placement = Placement.of(model, self.optimizer)
        self.scheduler = scheduler
        self._builds_optimizer = optimizer is None
        self._builds_scheduler = scheduler is None
        self.gradient_accumulator = GradientAccumulator(
            self.optimizer,
            training_config.gradient_accumulation_steps,
            training_config.max_grad_norm,
            scaler=build_scaler(training_config, self.device),
        )
        self.gradient_monitor = GradientMonitor.of(training_config)
        self.metrics_tracker = MetricsTracker()
        self.checkpoint_manager = CheckpointManager(
            self.runtime.storage,
            keep_best_k=training_config.keep_best_k,
            keep_last_n=training_config.keep_last_n,
            monitor=training_config.monitor,
            mode=training_config.mode,
        )
        self.progress = Progress()

    def train(self, train_data: Any, val_data: Any = None, resume_from: str | None = None) -> dict[str, Any]:
        """Train to the configured end, or to an early stop. Collective.

        Args:
            train_data: a map-style or iterable dataset, a `DataLoader`, a Hugging Face dataset, or a shard.
            val_data: the same; None validates on nothing, or on ``validation_split`` of the training data.
            resume_from: a checkpoint, a run directory, ``"auto"`` (the newest good checkpoint of this run, or
                a fresh start if it has not saved yet), or None for a fresh start; what an earlier run left in the
                directory is then moved to ``previous_NN/`` in it.

        Returns:
            ``metrics_summary`` (DataFrame, a row an epoch), ``best_epoch``, ``final_loss``,
            ``checkpoint_path`` (of the best checkpoint, or None) and ``training_time`` (s).

        Raises:
            DataError: the data cannot be trained on; before anything is written.
            CheckpointError: the checkpoint cannot be used, or the last one could not be written.
            LeaseHeldError: another process is at work on the run; nothing was written.
            DivergenceError: too many steps in a row had unusable gradients.
        """
        config = self.training_config
        config.validate()
        ownership = owned(self.runtime, self.checkpoint_manager, is_needed=not config.fast_dev_run)
        with distributed.membership(), deterministic_mode(config.deterministic), self.runtime, ownership:
            saved = self._restore(resume_from)
            with distributed.same_error_everywhere():
                setup = self._set_up(train_data, val_data, saved)
            with self._placement.trial():
                is_whole = self._placement.share is None  # else the pass communicates, and nobody may leave it alone
                may_need_less = config.on_out_of_memory == "halve" and is_whole
                try_first_batch(self.task, self.model, self.device, setup.sources, may_need_less)
            require_same_data(setup.data)
            interruption = self._carry_out(setup, saved, resume_from)
        self.runtime.conclude(interruption)
        return self._results(setup.monitor)

    def _restore(self, resume_from: str | None) -> LoadedCheckpoint | None:
        """The state to go on from: a survivor's, the newest snapshot in memory, or what storage has."""
        asked_at, asked_s = time.time(), time.perf_counter()
        saved = self._find_state(resume_from)
        return saved and replace(saved, asked_at=asked_at, state_s=time.perf_counter() - asked_s)

    def _find_state(self, resume_from: str | None) -> LoadedCheckpoint | None:
        store, share = self.runtime.snapshots, self._placement.share
        self._memory = None if store is None else MemoryTier(store, self.checkpoint_manager)
        survivors = self.runtime.survivor and SurvivorTier(self.runtime.survivor)
        if survivors and (alive := survivors.restore()):
            return alive
        snapshot = self._memory.restore(share) if self._memory and resume_from == "auto" else None
        saved = partial(saved_checkpoints, self.runtime.storage)
        return snapshot or self.checkpoint_manager.restore(resume_from, share, saved)

    def _set_up(self, train_data: Any, val_data: Any, saved: LoadedCheckpoint | None) -> Setup:
        """Find whatever is wrong with data and configuration before anything is written."""
        config = self.training_config
        global_batch_size = choose_global_batch_size(config, saved)
        data = UniversalDataModule(
            train_data,
            val_data,
            task_spec=self.task_spec,
            tokenizer=self.tokenizer,
            val_split=config.validation_split,
            bad_data=bad_data_policy(config, self.task_spec, self.data_collator),
            seed=config.random_seed,
            collate_fn=self.data_collator,
        )
        sources = Sources.of(config, data, global_batch_size)
        setup = decide(config, sources, global_batch_size, saved, self.task.metric_names)
        if self._builds_scheduler:
            self.scheduler = build_scheduler(self.optimizer, config, setup.limits.total_steps)
        return setup if saved else replace(setup, initial=initialise(self.model, config))

    def _carry_out(self, setup: Setup, saved: LoadedCheckpoint | None, resume_from: str | None) -> Stop:
        """Connect the parts, give them their state, and run; returns why the outside ended it, if it did."""
        self._hooks.align()
        self.progress, self.metrics_tracker = Progress(), MetricsTracker()
        self.gradient_accumulator.scheduler = self.scheduler
        self.checkpoint_manager.policy = replace(self.checkpoint_manager.policy, monitor=setup.monitor)
        books = self._open_books()
        recorder = Recorder(self.training_config, setup, self.task, books, self.progress, self.runtime)
        state = self._train_state(books, recorder, setup.sources.train)
        if saved is not None:
            state.load_state_dict({**saved.state, **(saved.rank_state or {})})
            self._follow_config()
        if setup.restarts_epoch:
            self.progress.restart_epoch()
            recorder.reset_epoch()
        is_alone = self.runtime.survivor is None
        forward = Forward.build(self.model, self.device, self.training_config, broadcasts_buffers=is_alone)
        if not self.training_config.fast_dev_run:
            make_room(self.checkpoint_manager, saved, resume_from)
            take_over_checkpoints(self.checkpoint_manager, saved)
        books.journal.open(saved)
        setup.tell(books.journal, self.progress)
        saver = self._build_saver(setup, state, books.journal)
        if saved is not None and saved.carried is not None:
            saver.go_on(saved.carried)
        rewind = self._build_rewind(state, saver, books.journal)
        marks = Marks(self.runtime.storage, is_on=not self.training_config.fast_dev_run)
        left = marks.left_before(books.journal.attempt)
        crashes = Crashes(self.training_config, self.progress, setup.sources.train, books.journal, marks)
        crashes.recall(self.runtime.storage, left)
        halving = Halving(self.training_config, self.progress, books.journal)
        halving.recall(self.runtime.storage, left)
        run = self._build_run(setup, forward, recorder, books, saver, rewind, crashes, halving)
        with self._hooks.training(), closing(books.journal), closing(saver), marks.kept(books.journal.attempt):
            if saved is not None and self._hooks.on_resume is not None:
                self._hooks.on_resume(ResumeRecord(saved.record.uri, saved.record.step, saved.record.epoch))
            if self.runtime.survivor is not None:
                SurvivorTier(self.runtime.survivor).release()  # it is in the parts now
            run.execute()
            books.journal.conclude(self.progress, run.interruption)
        return run.interruption

    def _follow_config(self) -> None:
        """Go on with the rates that the configuration says now, where they were built from it."""
        if self._builds_optimizer:
            follow_config(self.optimizer, self.training_config)
        if self._builds_scheduler:
            follow_schedule(self.optimizer, self.scheduler, self.training_config if self._builds_optimizer else None)

    def _open_books(self) -> Books:
        config = self.training_config
        return Books(
            sums=MetricSums(2 + 2 * len(self.task.metric_names)),
            tracker=self.metrics_tracker,
            journal=Journal(self.runtime, config),
            early_stopping=EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta, config.mode),
        )

    def _train_state(self, books: Books, recorder: Recorder, source: BatchSource) -> TrainState:
        """Register everything that a checkpoint has to hold."""
        parts: dict[str, Stateful] = {
            **self._placement.parts,
            "accumulator": self.gradient_accumulator,
            "monitor": self.gradient_monitor,
            "progress": self.progress,
            "sums": books.sums,
            "history": books.tracker,
            "early_stopping": books.early_stopping,
            "recorder": recorder,
            "hooks": self._hooks,
        }
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler
        if isinstance(source, Stateful):
            parts["data"] = source
        return TrainState(parts)

    def _build_saver(self, setup: Setup, state: TrainState, journal: Journal) -> Saver:
        meta = CheckpointMeta(
            epoch=0,
            step=0,
            global_batch_size=setup.global_batch_size,
            config=self.training_config.to_dict(),
            data_fingerprint=setup.data["train"]["fingerprint"],
            data=setup.data,
            attempt=journal.attempt,
        )
        audience = Audience(self.runtime, journal, self._hooks)
        return Saver(self.training_config, self.checkpoint_manager, state, self.progress, meta, audience, self._memory)

    def _build_rewind(self, state: TrainState, saver: Saver, journal: Journal) -> Rewind:
        manager, share = self.checkpoint_manager, self._placement.share
        return Rewind(manager, state, saver, journal, self._hooks, share, self._follow_config)

    def _build_run(
        self,
        setup: Setup,
        forward: Forward,
        recorder: Recorder,
        books: Books,
        saver: Saver,
        rewind: Rewind,
        crashes: Crashes,
        halving: Halving,
    ) -> Run:
        is_elastic = self.training_config.determinism == "elastic"
        most = setup.sources.micro_batches_a_step
        loop = (partial(ElasticLoop, micro_batches_a_step=most) if is_elastic else TrainingLoop)(
            forward,
            self.task,
            accumulator=self.gradient_accumulator,
            monitor=self.gradient_monitor,
            progress=self.progress,
            sums=books.sums,
            runtime=self.runtime,
            seed=self.training_config.random_seed,
            saving_to=saver.busy,
            may_retry=halving.take,
            watch=crashes,
        )
        validation = ValidationLoop(forward, self.task, self.runtime, in_order=is_elastic)
        rollback = Rollback(self.gradient_monitor, recorder, rewind)
        every_n_steps = self.training_config.compare_replicas_every_n_steps
        replicas = Replicas(every_n_steps, self.model, self.progress, rewind)
        safeguards = Safeguards(saver, rollback, replicas)
        survivor = self.runtime.survivor
        interruption = Stop.NONE if survivor is None else Stop(survivor.stop)
        return Run(self.training_config, setup, loop, validation, recorder, safeguards, self._hooks, interruption)

    def _results(self, monitor: str) -> dict[str, Any]:
        history = self.metrics_tracker.metrics_history
        best = None if self.training_config.fast_dev_run else self.checkpoint_manager.get_best()
        mode = self.training_config.mode
        return {
            "metrics_summary": self.metrics_tracker.get_summary(),
            "best_epoch": self.metrics_tracker.get_best_epoch(monitor.replace("_", "/", 1), mode),
            "final_loss": history[-1]["train/loss"] if history else None,
            "checkpoint_path": None if best is None else str(best),
            "training_time": self.progress.elapsed_s,
        }
