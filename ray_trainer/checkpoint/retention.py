"""Which checkpoints are worth their space."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.layout import checkpoint_order
from ray_trainer.checkpoint.manifest import monitor_value
from ray_trainer.errors import ConfigError

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class RetentionPolicy:
    """Keep the newest and the best; a checkpoint whose metric is missing or not finite is never best.

    Attributes:
        keep_last_n: how many of the newest; None keeps all.
        keep_best_k: how many of the best.
        monitor: the metric that decides.
        mode: whether less or more of it is better.
        needed_step: the run may go back to this step, so the newest of those up to it stays; None for no such.
    """

    keep_last_n: int | None
    keep_best_k: int
    monitor: str
    mode: Mode
    needed_step: int | None = None

    def __post_init__(self) -> None:
        errors = []
        if self.keep_last_n is not None and self.keep_last_n < 1:
            errors.append(f"keep_last_n ({self.keep_last_n}) must be at least 1, or None to keep all.")
        if self.keep_best_k < 0:
            errors.append(f"keep_best_k ({self.keep_best_k}) must not be negative.")
        if self.mode not in ("min", "max"):
            errors.append(f"mode ({self.mode!r}) must be 'min' or 'max'.")
        if errors:
            raise ConfigError("\n".join(errors))

    def best_first(self, records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
        """Those with a comparable metric; of equal ones the earlier step first, and its latest copy."""
        sign = 1 if self.mode == "min" else -1
        ranked = []
        for record in records:
            value, order = monitor_value(record.metrics, self.monitor), checkpoint_order(record.name)
            if value is not None and order is not None:
                ranked.append(((sign * value, order.step, -order.epoch, -order.copy), record))
        return [record for _, record in sorted(ranked, key=lambda item: item[0])]

    def best(self, records: Iterable[CheckpointRecord]) -> CheckpointRecord | None:
        """The best of those with a comparable metric, if any."""
        return next(iter(self.best_first(records)), None)

    def removable(
        self, records: Collection[CheckpointRecord], protected: Collection[str] = ()
    ) -> list[CheckpointRecord]:
        """Those to delete.

        Args:
            records: all checkpoints of the run, old to new.
            protected: names that stay whatever the rule says.
        """
        if self.keep_last_n is None:
            return []
        kept = {record.name for record in list(records)[-self.keep_last_n :]}
        kept |= {record.name for record in self.best_first(records)[: self.keep_best_k]}
        kept |= {record.name for record in self._before_needed(records)[-1:]}
        kept |= set(protected)
        return [record for record in records if record.name not in kept]

    def _before_needed(self, records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
        return [] if self.needed_step is None else [record for record in records if record.step <= self.needed_step]
