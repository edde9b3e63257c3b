"""Who is told what becomes of a checkpoint: Ray, the run's record, and the user's hooks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_trainer.checkpoint import CheckpointRecord, Commit
from ray_trainer.hooks import CheckpointSaved, HookCaller
from ray_trainer.journal import Journal
from ray_trainer.runtime import Runtime


@dataclass(frozen=True)
class Audience:
    """All that want to know, on this rank."""

    runtime: Runtime
    journal: Journal
    hooks: HookCaller

    def saved(
        self,
        record: CheckpointRecord,
        commit: Commit,
        metrics: Mapping[str, Any],
        best: Callable[[], CheckpointRecord | None],
    ) -> None:
        """A checkpoint is whole.

        Args:
            record: what it is.
            commit: how it came to be.
            metrics: of the run when it was begun.
            best: which is the best by now; asked only for those who want to know.
        """
        self.runtime.checkpoint_committed(record.uri, metrics)
        costs: dict[str, Any] = {
            "stall_s": commit.stall_s,
            "durable_s": commit.durable_s,
            "size_bytes": record.size_bytes,
        }
        self.journal.event("checkpoint_saved", record.step, record.epoch, checkpoint=record.name, **costs)
        if self.hooks.on_checkpoint_saved is not None:
            leader = best()
            self.hooks.on_checkpoint_saved(
                CheckpointSaved(
                    path=record.uri,
                    step=record.step,
                    epoch=record.epoch,
                    metrics=record.metrics,
                    is_best=leader is not None and leader.name == record.name,
                    **costs,
                )
            )

    def failed(self, step: int, epoch: int, reason: str) -> None:
        """There will be no checkpoint of the steps up to this one for now."""
        self.journal.event("checkpoint_failed", step, epoch, reason=reason)

    def skipped(self, step: int, epoch: int, reason: str) -> None:
        """A checkpoint that was due at this step was not begun."""
        self.journal.event("checkpoint_skipped", step, epoch, reason=reason)
