"""When a checkpoint is written during a run, and what happens where it can't be."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray_trainer import distributed, pulse
from ray_trainer.audience import Audience
from ray_trainer.checkpoint import (
    Carried,
    CheckpointManager,
    CheckpointMeta,
    CheckpointRecord,
    Commit,
    MemoryTier,
    SurvivorTier,
    Tier,
)
from ray_trainer.config import TrainingConfig
from ray_trainer.errors import CheckpointError, LeaseLostError
from ray_trainer.state import Progress, TrainState
from ray_trainer.triggers import AffordableInterval, Backoff, Moment, any_of

logger = logging.getLogger(__name__)


class Saver:
    """Writes the state of a run when it is due. All decisions are equal on all ranks.

    Saving stops training for as long as the state is copied; it is written while training goes on, and
    whoever is told of it is told when it is whole. One at a time.

    Attributes:
        saved_at_s: time of training when the last one was begun.
    """

    def __init__(
        self,
        config: TrainingConfig,
        manager: CheckpointManager,
        state: TrainState,
        progress: Progress,
        meta: CheckpointMeta,
        audience: Audience,
        memory: MemoryTier | None = None,
    ) -> None:
        """Prepare to save.

        Args:
            config: the intervals; ``fast_dev_run`` saves nothing.
            manager: commits and retains.
            state: what is saved.
            progress: tells where the run is.
            meta: what is the same in every manifest of the run.
            audience: told after each commit.
            memory: takes snapshots besides.
        """
        self._manager = manager
        self._memory = memory
        self._state = state
        self._progress = progress
        self._meta = meta
        self._audience = audience
        self._is_on = not config.fast_dev_run
        self._affordable = AffordableInterval(config.save_budget) if config.save_interval == "auto" else None
        self._trigger = any_of(
            steps=config.save_every_n_steps,
            epochs=config.save_every_n_epochs,
            minutes=config.save_every_minutes,
            other=self._affordable,
        )
        self._may_skip = config.overlapping_saves == "skip"
        self._max_failures = config.max_failed_saves
        self._backoff = Backoff()
        self._saved: _Mark | None = self._mark()
        self._pending: _Pending | None = None
        self._is_prepared = False
        self._owes = False
        self.saved_at_s = progress.elapsed_s

    def go_on(self, carried: Carried) -> None:
        """Take over what the saver knew whose run this one continues, without a checkpoint of that very step."""
        self.saved_at_s, self._owes = carried.saved_at_s, carried.owes_save
        if carried.saved_step != self._progress.step:
            self._saved = None

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Keep the state of the last completed step in this process, where that is of use; the run is broken."""
        audience = self._audience
        memory = audience.runtime.survivor
        if memory is None:
            return
        is_saved = self._saved is not None and not self._owes
        carried = Carried(
            rows=audience.journal.recent_rows(),
            saved_step=self._saved[0] if self._saved is not None and is_saved else -1,
            saved_at_s=self.saved_at_s,
            owes_save=self._owes,
        )
        try:
            own = {"hooks": audience.hooks.state_dict()}
            SurvivorTier(memory).keep(self._state.state_dict(), own, self._meta_now(metrics), carried, self._manager)
        except Exception as error:  # the loss that is on its way matters more; others may have the state
            logger.warning("The state of step %d can't be kept: %r", self._progress.step, error)

    @property
    def is_behind(self) -> bool:
        """Whether no checkpoint of the last completed step has been begun."""
        return self._saved != self._mark()

    def due(self, moment: Moment) -> bool:
        """Whether the configured intervals ask for a checkpoint now, or one that failed is to be tried again."""
        is_asked = self._trigger.due(moment) or self._backoff.due(self._progress.elapsed_s)
        is_owed = self._owes and self._pending is None  # one that a broken run had begun
        return self._is_on and (is_asked or is_owed)

    def busy(self) -> Tier:
        """Where this rank's part of a checkpoint is on its way to; costs nothing where there is none."""
        busy = Tier.NONE
        if self._pending is not None and not self._pending.commit.is_done():
            busy |= Tier.STORAGE
        if self._memory is not None and self._memory.is_busy():
            busy |= Tier.MEMORY
        return busy

    def snapshot_is_due(self, busy: Tier) -> bool:
        """Whether memory wants a snapshot of the last completed step, and has the one before.

        Args:
            busy: as for `poll`.
        """
        is_free = self._is_on and self._memory is not None and Tier.MEMORY not in busy
        return is_free and self._memory is not None and self._memory.due(self._progress.step)

    def snapshot(self, metrics: Mapping[str, float]) -> None:
        """Take a snapshot of the last completed step to memory. On all ranks."""
        assert self._memory is not None  # it is due only there
        pulse.beat(pulse.Phase.SAVE)
        self._audience.journal.flush()  # rows up to here must not be lost with this process
        self._memory.take(self._state.state_dict(), self._rank_state(), self._meta_now(metrics))

    def poll(self, busy: Tier) -> None:
        """Go on with the checkpoint that is being written; after each step. Collective if there is one.

        Args:
            busy: where that of any rank is on its way to.

        Raises:
            CheckpointError: it failed, as did those before it.
        """
        if self._pending is not None and Tier.STORAGE not in busy:
            self._attempt(self._advance)
        elif self._is_on and not self._is_prepared:
            self._manager.prepare(self._state.state_dict(("model", "optimizer")))
        self._is_prepared = True

    def save(self, metrics: Mapping[str, float], may_skip: bool = False) -> None:
        """Begin a checkpoint of the last completed step. Collective.

        Args:
            metrics: of the run now.
            may_skip: not to wait for the one before, where the configuration allows that.

        Raises:
            CheckpointError: it failed, as did those before it.
        """
        if not self._is_on:
            return
        if self._pending is not None and may_skip and self._may_skip:
            self._tell_skipped(self._pending)
        elif self._attempt(self._finish):
            self._attempt(lambda: self._begin(metrics))

    def save_last(self, metrics: Mapping[str, float]) -> None:
        """Make sure that the last completed step is in a checkpoint that is whole. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        if not self._is_on:
            return
        self._attempt(self._finish)
        if self._saved != self._mark():
            self._attempt(partial(self._begin, metrics), is_last=True)
            self._attempt(self._finish, is_last=True)

    def save_after_error(self, metrics: Mapping[str, float]) -> None:
        """As `save_last`, while an error is on its way that matters more than one of saving."""
        try:
            self.save_last(metrics)
        except CheckpointError as error:
            logger.error("No checkpoint of step %d after the error: %s", self._progress.step, error)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Collective."""
        self._attempt(self._finish)

    def restart(self) -> None:
        """The run has gone back to an earlier step, of which nothing is saved as far as this knows."""
        self._saved = None
        self._backoff.begin()
        self.saved_at_s = self._progress.elapsed_s

    def close(self) -> None:
        """Free the memory of snapshots; a checkpoint that is being written is given up."""
        self._manager.close()
        if self._memory is not None:
            self._memory.close()

    def _begin(self, metrics: Mapping[str, float]) -> None:
        pulse.beat(pulse.Phase.SAVE)
        meta = self._meta_now(metrics)
        self.saved_at_s = self._progress.elapsed_s
        self._backoff.begin()
        self._owes = True
        self._audience.journal.flush()  # rows up to here do not come again, where a run goes on from this checkpoint
        commit = self._manager.begin(self._state.state_dict(), self._rank_state(), meta)
        self._saved = self._mark()
        self._pending = _Pending(commit, meta.metrics)
        if commit.is_immediate:
            self._finish()

    def _meta_now(self, metrics: Mapping[str, float]) -> CheckpointMeta:
        progress = self._progress
        return replace(self._meta, epoch=progress.last_epoch, step=progress.step, metrics=dict(metrics))

    def _finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        while self._pending is not None:
            self._advance()

    def _advance(self) -> None:
        assert self._pending is not None  # asked by those who know
        pulse.beat(pulse.Phase.SAVE)
        pending = self._pending
        try:
            record = self._manager.advance(pending.commit)
        except CheckpointError:
            self._pending = self._saved = None
            raise
        if record is not None:
            self._pending = None
            self._owes = False
            self._backoff.succeed()
            self._tell(record, pending)

    def _attempt(self, action: Callable[[], None], is_last: bool = False) -> bool:
        """Do something that may fail for a while, unless it is the last, without ending the run; whether it did not."""
        try:
            action()
        except LeaseLostError:  # nothing will ever be saved again
            self._saved = None
            raise
        except CheckpointError as error:  # equal on all ranks
            self._saved = None
            self._owes = False
            self._backoff.fail(self._progress.elapsed_s)
            self._audience.failed(self._progress.step, self._progress.last_epoch, str(error))
            logger.error("No checkpoint up to step %d: %s", self._progress.step, error)
            if is_last or self._backoff.failures >= self._max_failures:
                raise
            return False
        return True

    def _tell(self, record: CheckpointRecord, pending: "_Pending") -> None:
        if self._affordable is not None:
            self._affordable.learn(pending.commit.stall_s, self._meta.attempt - 1, self._progress.elapsed_s)
        self._audience.saved(record, pending.commit, pending.metrics, self._manager.best_record)

    def _tell_skipped(self, pending: "_Pending") -> None:
        if not pending.has_delayed:
            pending.has_delayed = True
            reason = f"the checkpoint of step {pending.commit.step} is still being written"
            self._audience.skipped(self._progress.step, self._progress.last_epoch, reason)

    def _rank_state(self) -> dict[str, Any]:
        """What is not rank 0's on this rank: the state of its hooks."""
        hooks = self._audience.hooks.state_dict() if distributed.rank() > 0 else {}
        return {"hooks": hooks} if hooks else {}

    def _mark(self) -> "_Mark":
        return self._progress.step, self._progress.stop_reason


_Mark = tuple[int, str | None]


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        commit: its way to storage.
        metrics: of the run when it was begun.
        has_delayed: another was due meanwhile.
    """

    commit: Commit
    metrics: Mapping[str, float]
    has_delayed: bool = False
