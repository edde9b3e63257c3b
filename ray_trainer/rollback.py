"""Going back to a state before the numbers went wrong, and past the batches that led there."""

import logging
from typing import Any

from ray_trainer import distributed
from ray_trainer.checkpoint.agreement import on_rank_zero
from ray_trainer.checkpoint.ring import StateRing
from ray_trainer.errors import DivergenceError
from ray_trainer.gradients import GradientMonitor
from ray_trainer.hooks import StepRecord
from ray_trainer.recording import Recorder
from ray_trainer.rewind import Rewind

logger = logging.getLogger(__name__)

#: What a rollback undoes. The position in the data, the history and what was judged by it stay.
_UNDONE = frozenset({"model", "optimizer", "scheduler", "accumulator", "monitor", "sums", "hooks"})


class Rollback:
    """Keeps some of the newest states in memory, and goes back to one of them.

    The training goes on with the batch after the one that went wrong, as PaLM's authors did (Chowdhery et al. 2022,
    arXiv:2204.02311, section 5.1): the batches since the state are not used again, and their steps count as
    skipped ones.

    Which state it is follows from the steps alone (`RollbackPoints`), so a run that was interrupted anywhere does
    the same. A process that does not have it in memory, because it was started later, goes back to the newest
    checkpoint before it and trains up to the same place again, with all states in memory then. There always is
    one: a run that may roll back begins with a checkpoint of step 0, and keeps the newest before all points.

    Args:
        monitor: judges, and has the points.
        recorder: of the run's sums.
        rewind: goes back to a checkpoint.
    """

    def __init__(self, monitor: GradientMonitor, recorder: Recorder, rewind: Rewind) -> None:
        self.is_on = monitor.policy.rolls_back
        self._monitor = monitor
        self._recorder = recorder
        self._progress = recorder.progress
        self._rewind = rewind
        self._ring = StateRing()
        self._hold_on()

    def needs_first_checkpoint(self) -> bool:
        """Whether the run has none yet, at its beginning. Collective if rollbacks are wanted."""
        return self.is_on and on_rank_zero(self._rewind.manager.newest_step) < 0

    def keep(self) -> None:
        """Keep the state of the last completed step, where that is due. Collective then."""
        step, points = self._progress.step, self._monitor.points
        if not self.is_on:
            return
        if points.is_due(step):
            points.add(step)
        if step not in points.steps:
            return
        self._recorder.flush()
        self._ring.only(points.steps)
        self._ring.keep(step, self._rewind.state.state_dict(_UNDONE | {"progress"}))
        self._hold_on()

    def carry_out(self, record: StepRecord) -> bool:
        """Go back after a step that went wrong. Collective.

        Returns:
            Whether training has to begin anew from an earlier step; else it goes on with the next batch.

        Raises:
            DivergenceError: it did not help too many times, or there is nothing to go back to.
        """
        target = self._monitor.points.target(record.step, record.reason or "")
        if all(distributed.gather_objects(target in self._ring)):
            self._undo(target, record)
            return False
        self._begin_before(target, record)
        return True

    def _undo(self, target: int, record: StepRecord) -> None:
        monitor, progress = self._monitor, self._progress
        state = self._ring.state(target)
        before = state.pop("progress")
        num_undone = record.step - target
        state["sums"] = self._sums_after(state["sums"], before)
        state["accumulator"]["skipped_steps"] += num_undone
        state["monitor"] |= {"total_failures": monitor.total_failures, "points": monitor.points.state_dict()}
        self._rewind.state.load_parts(state)
        monitor.points.go_back(target, record.step)
        self._ring.only(monitor.points.steps)
        progress.skipped_steps = before["skipped_steps"] + num_undone
        self._tell(target, record, tier="memory")

    def _sums_after(self, sums: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """Without the steps that are undone: an epoch that began since is empty, and what was logged is told."""
        zeros = [0.0] * len(sums["epoch"])
        if before["epoch"] != self._progress.epoch:
            sums |= {"epoch": zeros, "epoch_steps": 0}
        if self._recorder.row_step > before["step"]:
            sums |= {"interval": zeros, "interval_steps": 0}
        return sums

    def _begin_before(self, target: int, record: StepRecord) -> None:
        loaded = self._rewind.to_checkpoint(target)
        if loaded is None:
            error = DivergenceError(
                f"Training unstable at step {record.step} ({record.reason}), and the state of step {target} to go back "
                "to is neither in memory nor in a checkpoint before it. Give the command again after removing the "
                "checkpoints since then, or with a lower learning_rate."
            )
            error.on_all_ranks = True
            raise error
        self._ring.only(())
        self._hold_on()
        self._tell(target, record, tier="storage", **{"from": loaded.record.name})

    def _hold_on(self) -> None:
        """Keep the checkpoint from which the oldest point can be reached again."""
        if self.is_on and self._monitor.points.steps:
            self._rewind.manager.keep_for(self._monitor.points.steps[0])

    def _tell(self, target: int, record: StepRecord, **details: Any) -> None:
        self._rewind.journal.event(
            "rolled_back",
            record.step,
            record.epoch,
            to_step=target,
            first_skipped=target + 1,
            reason=record.reason,
            gradient_norm=record.gradient_norm,
            **details,
        )
        place = "in memory" if details["tier"] == "memory" else f"after {details['from']}, up to which it trains again"
        logger.warning("Step %d: %s. Back to step %d %s.", record.step, record.reason, target, place)
