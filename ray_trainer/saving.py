"""When a checkpoint is written during a run, and who is told of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, LoadedCheckpoint
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import CheckpointError
from ray_trainer.hooks import CheckpointSaved, HookCaller
from ray_trainer.journal import RUN_FILES, Journal, move_aside
from ray_trainer.runtime import Runtime
from ray_trainer.state import Progress, TrainState
from ray_trainer.triggers import Moment, any_of

logger = logging.getLogger(__name__)

#: A save that failed is told and training goes on; so many failures in a row, over so long, end the run.
MAX_FAILED_SAVES = 3
MAX_FAILING_S = 600.0


@dataclass(frozen=True)
class Audience:
    """Who is told of a checkpoint."""

    runtime: Runtime
    journal: Journal
    hooks: HookCaller


class Saver:
    """Writes the state of a run when it is due. All decisions are equal on all ranks."""

    def __init__(
        self,
        config: TrainingConfig,
        manager: CheckpointManager,
        state: TrainState,
        progress: Progress,
        meta: CheckpointMeta,
        audience: Audience,
    ) -> None:
        """Prepare to save.

        Args:
            config: the intervals; ``fast_dev_run`` saves nothing.
            manager: commits and retains.
            state: what is saved.
            progress: tells where the run is.
            meta: what is the same in every manifest of the run.
            audience: told after each commit.
        """
        self._manager = manager
        self._state = state
        self._progress = progress
        self._meta = meta
        self._audience = audience
        self._is_on = not config.fast_dev_run
        self._trigger = any_of(
            steps=config.save_every_n_steps,
            epochs=config.save_every_n_epochs,
            minutes=config.save_every_minutes,
        )
        self._failures = 0
        self._failing_since_s = 0.0
        self._saved = self._mark()
        self.saved_at_s = progress.elapsed_s

    def due(self, moment: Moment) -> bool:
        """Whether the configured intervals ask for a checkpoint now."""
        return self._is_on and self._trigger.due(moment)

    def save(self, metrics: Mapping[str, float]) -> None:
        """Commit a checkpoint of the last completed step and tell everybody. Collective.

        Raises:
            CheckpointError: it failed, as did those before it.
        """
        if not self._is_on:
            return
        try:
            self._commit(metrics)
        except CheckpointError as error:  # equal on all ranks
            self._failures += 1
            self.saved_at_s = self._progress.elapsed_s  # the next one is due an interval later
            if self._failures == 1:
                self._failing_since_s = self._progress.elapsed_s
            self._audience.journal.event(
                "checkpoint_failed", self._progress.step, self._progress.last_epoch, reason=str(error)
            )
            logger.error("No checkpoint of step %d: %s", self._progress.step, error)
            failing_s = self._progress.elapsed_s - self._failing_since_s
            if self._failures >= MAX_FAILED_SAVES and failing_s >= MAX_FAILING_S:
                raise

    def save_last(self, metrics: Mapping[str, float]) -> None:
        """Make sure that the last completed step is in a checkpoint. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._is_on and self._saved != self._mark():
            self._commit(metrics)

    def save_after_error(self, metrics: Mapping[str, float]) -> None:
        """As `save_last`, while an error is on its way that matters more than one of saving."""
        try:
            self.save_last(metrics)
        except CheckpointError as error:
            logger.error("No checkpoint of step %d after the error: %s", self._progress.step, error)

    def _commit(self, metrics: Mapping[str, float]) -> None:
        progress = self._progress
        meta = replace(self._meta, epoch=progress.last_epoch, step=progress.step, metrics=dict(metrics))
        record = self._manager.commit(self._state.state_dict(), self._rank_state(), meta)
        self._failures = 0
        self._saved = self._mark()
        self.saved_at_s = progress.elapsed_s
        self._audience.runtime.checkpoint_committed(record.uri, metrics)
        self._audience.journal.event(
            "checkpoint_saved",
            record.step,
            record.epoch,
            checkpoint=record.name,
            stall_s=record.seconds,
            durable_s=record.seconds,
            size_bytes=record.size_bytes,
        )
        if self._audience.hooks.on_checkpoint_saved is not None:
            best = self._manager.best_record()
            self._audience.hooks.on_checkpoint_saved(
                CheckpointSaved(
                    path=record.uri,
                    step=record.step,
                    epoch=record.epoch,
                    metrics=record.metrics,
                    is_best=best is not None and best.name == record.name,
                    stall_s=record.seconds,
                    durable_s=record.seconds,
                    size_bytes=record.size_bytes,
                )
            )

    def _rank_state(self) -> dict[str, Any]:
        """What is not rank 0's on this rank: the state of its hooks."""
        hooks = self._audience.hooks.state_dict() if distributed.rank() > 0 else {}
        return {"hooks": hooks} if hooks else {}

    def _mark(self) -> tuple[int, str | None]:
        return self._progress.step, self._progress.stop_reason


def make_room(manager: CheckpointManager, saved: LoadedCheckpoint | None, resume_from: str | None) -> None:
    """Leave in the run's directory what the run goes on from, and nothing that would be mixed up with it.

    A fresh start moves an earlier run, and a start from an older checkpoint moves the later ones, to
    ``previous_NN/``. Rank 0 acts; collective.
    """
    storage = manager.storage
    with distributed.same_error_everywhere():
        if distributed.rank() == 0:
            manager.clean_leftovers()
            later = [record.name for record in manager.records() if saved is None or record.step > saved.record.step]
            if saved is None:
                later += [name for name in RUN_FILES if storage.exists(name)] if resume_from is None else []
            place = move_aside(storage, later)
            if place is not None:
                logger.warning("What an earlier run left in %s is in %s/ there now.", storage.uri, place)
            manager.forget()
