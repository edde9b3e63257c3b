"""The history of a run: one row an epoch, and the scalars that were logged in between."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_METRIC_ORDER = ("loss", "accuracy", "perplexity")
_LAST_COLUMNS = ("learning_rate", "gradient_norm", "epoch_duration")
_STEP_COLUMNS = ("step", "metric", "value", "timestamp")
_MAX_EXPONENT = 100.0


class MetricsTracker:
    """Keeps what was logged, no more: no value is computed, filled in or invented here.

    Attributes:
        metrics_history: a row an epoch, in the order of epochs: ``epoch``, ``train/...``, ``val/...``
            where the epoch was validated, ``learning_rate``, ``gradient_norm``, ``epoch_duration`` (s).
    """

    def __init__(self, max_step_rows: int = 10_000, clock: Callable[[], float] = time.time) -> None:
        """Start with an empty history.

        Args:
            max_step_rows: as many of the newest scalars are kept; the older ones are in ``metrics.jsonl``.
            clock: the time in seconds since 1970.
        """
        self.metrics_history: list[dict[str, Any]] = []
        self._step_rows: deque[tuple[int, str, float, float]] = deque(maxlen=max_step_rows)
        self._next_step: dict[str, int] = {}
        self._clock = clock

    @staticmethod
    def compute_perplexity(loss: float) -> float:
        """``exp`` of a mean cross-entropy in nats; capped at ``exp(100)``, so that it never overflows."""
        return math.exp(min(loss, _MAX_EXPONENT)) if not math.isnan(loss) else math.nan

    @staticmethod
    def compute_accuracy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> float:
        """The share of labels that the largest logit hits.

        Labels are compared at their own position: shift those of a language model first. Waits for the
        device.

        Args:
            logits: ``(..., C)`` for C classes.
            labels: ``(...)``.
            ignore_index: labels of this value do not count.

        Returns:
            0 to 1; NaN if no label counts.
        """
        counts = labels != ignore_index
        hits = (logits.argmax(dim=-1) == labels) & counts
        total = int(counts.sum())
        return int(hits.sum()) / total if total else math.nan

    def log_scalar(self, name: str, value: SupportsFloat, step: int | None = None) -> None:
        """Keep one value for `get_step_metrics`.

        Args:
            name: of the metric.
            value: a number; NaN and infinity are numbers here.
            step: completed steps; by default one more than this metric's last.

        Raises:
            ValueError: the name is empty or the value is no number.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"A metric's name must be a non-empty string, not {name!r}.")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(
                f"The value of {name!r} must be numeric, not {value!r}. Pass a float; tensor.item() is one."
            )
        if step is None:
            step = self._next_step.get(name, 0)
        self._next_step[name] = step + 1
        self._step_rows.append((step, name, float(value), self._clock()))

    def get_step_metrics(self) -> "pd.DataFrame":
        """What was logged by `log_scalar`: ``step``, ``metric``, ``value``, ``timestamp`` (s since 1970)."""
        import pandas as pd

        return pd.DataFrame(list(self._step_rows), columns=list(_STEP_COLUMNS))

    def log_epoch(
        self,
        epoch: int,
        train_metrics: Mapping[str, float],
        val_metrics: Mapping[str, float] | None = None,
        learning_rate: float | None = None,
        gradient_norm: float | None = None,
        epoch_duration: float | None = None,
    ) -> dict[str, Any]:
        """Add an epoch's row to the history; one of the same epoch is replaced.

        Args:
            epoch: counted from 0.
            train_metrics: by plain name: ``loss``, ``accuracy``, ...
            val_metrics: likewise; None for an epoch without validation, which then has no ``val/`` entries.
            learning_rate: at the end of the epoch.
            gradient_norm: before clipping.
            epoch_duration: in seconds.

        Returns:
            The row.
        """
        row: dict[str, Any] = {"epoch": epoch}
        for split, metrics in (("train", train_metrics), ("val", val_metrics or {})):
            row |= {f"{split}/{name}": metrics[name] for name in sorted(metrics, key=_metric_place)}
        last = zip(_LAST_COLUMNS, (learning_rate, gradient_norm, epoch_duration), strict=True)
        row |= {name: value for name, value in last if value is not None}
        self.metrics_history = [known for known in self.metrics_history if known["epoch"] != epoch]
        self.metrics_history.append(row)
        self.metrics_history.sort(key=lambda known: int(known["epoch"]))
        return row

    def get_summary(self) -> "pd.DataFrame":
        """The history as a table, a row an epoch, columns always in the same order.

        What one epoch lacks and another has is NaN; a column that no epoch has does not exist.
        """
        import pandas as pd

        columns = dict.fromkeys(["epoch", *(name for row in self.metrics_history for name in row)])
        return pd.DataFrame(self.metrics_history, columns=sorted(columns, key=_column_place))

    def get_best_epoch(self, column: str = "val/loss", mode: Literal["min", "max"] = "min") -> int | None:
        """The epoch whose value is best, the earliest of equal ones; NaN never is.

        Returns:
            None if no epoch has a value.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', not {mode!r}.")
        values = {row["epoch"]: row[column] for row in self.metrics_history if column in row}
        usable = [epoch for epoch, value in values.items() if not math.isnan(value)]
        sign = 1 if mode == "min" else -1
        return min(usable, key=lambda epoch: sign * values[epoch], default=None)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        columns = zip(*self._step_rows, strict=True) if self._step_rows else ([] for _ in _STEP_COLUMNS)
        return {
            "epochs": [dict(row) for row in self.metrics_history],
            "steps": {name: list(column) for name, column in zip(_STEP_COLUMNS, columns, strict=True)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a history, in place of what was logged here."""
        self.metrics_history = [dict(row) for row in state_dict["epochs"]]
        self._step_rows.clear()
        self._step_rows.extend(zip(*(state_dict["steps"][name] for name in _STEP_COLUMNS), strict=True))
        self._next_step = {name: step + 1 for step, name, _, _ in self._step_rows}


def _metric_place(name: str) -> tuple[int, str]:
    """Loss first, then the usual ones, then by name."""
    return (_METRIC_ORDER.index(name) if name in _METRIC_ORDER else len(_METRIC_ORDER), name)


def _column_place(column: str) -> tuple[int, int, str]:
    if column == "epoch":
        return (0, 0, "")
    if column in _LAST_COLUMNS:
        return (3, _LAST_COLUMNS.index(column), "")
    split, _, name = column.partition("/")
    return (1 if split == "train" else 2, *_metric_place(name))
