"""Going back to an earlier point of a run without a restart."""

import logging
from collections.abc import Callable
from typing import Any

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, LoadedCheckpoint
from ray_trainer.checkpoint.shards import Share
from ray_trainer.clearing import make_room
from ray_trainer.hooks import HookCaller, ResumeRecord
from ray_trainer.journal import Journal
from ray_trainer.saving import Saver
from ray_trainer.state import TrainState

logger = logging.getLogger(__name__)


class Rewind:
    """Does in place what a restart from an earlier state does: afterwards the run is where that state is.

    What lies after it is told by events, but is in no checkpoint and no metrics.

    Args:
        manager: of the run's checkpoints.
        state: all parts of the run.
        saver: is told, so that it neither skips nor mixes up what comes again.
        journal: drops the rows of steps that come again.
        hooks: are told of a checkpoint that is gone back to.
        share: which part of a checkpoint this rank needs.
        follow_config: called after the state is loaded.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        state: TrainState,
        saver: Saver,
        journal: Journal,
        hooks: HookCaller,
        share: Share | None,
        follow_config: Callable[[], None],
    ) -> None:
        self.manager = manager
        self.state = state
        self.journal = journal
        self._saver = saver
        self._hooks = hooks
        self._share = share
        self._follow_config = follow_config

    def to_checkpoint(self, step: int) -> LoadedCheckpoint | None:
        """Go back to the newest whole checkpoint of those up to a step; None if there is none. Collective."""
        self._saver.settle()
        loaded = self.manager.restore_up_to(step, self._share)
        if loaded is None:
            return None
        make_room(self.manager, loaded, "auto")
        self.state.load_state_dict({**loaded.state, **(loaded.rank_state or {})})
        self._follow_config()
        self._forget_after(loaded.record.step)
        if self._hooks.on_resume is not None:
            self._hooks.on_resume(ResumeRecord(loaded.record.uri, loaded.record.step, loaded.record.epoch))
        return loaded

    def to_state(self, state: dict[str, Any]) -> None:
        """Go back to a state that was kept in memory, of all parts. Collective."""
        self.state.load_state_dict(state)
        self._forget_after(state["progress"]["step"])

    def _forget_after(self, step: int) -> None:
        with distributed.same_error_everywhere():
            self.journal.rewind(step)
        self._saver.restart()
