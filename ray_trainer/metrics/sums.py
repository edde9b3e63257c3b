"""Sums and counts over the steps of an epoch and of a logging interval, exact wherever they are read."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ray_trainer import distributed
from ray_trainer.errors import StateMismatchError

Number = Tensor | int | float


class MetricSums:
    """Totals over all steps, micro-batches and ranks, of the open epoch and since the last log.

    A step only puts its values into a list. `flush` reads them: for each step it adds the ranks in rank
    order, then the steps one after the other, in float64. So the totals do not depend, to the last bit, on
    when and how often they are read, nor on where a run was interrupted. NaN and infinity pass through.

    Attributes:
        epoch: global totals of the epoch's flushed steps, in the order of the rows' values.
        epoch_steps: how many steps those are.
        interval_steps: how many of them since the last `take_interval`.
    """

    def __init__(self, width: int, gather: Callable[[Tensor], Tensor] = distributed.gather_rows) -> None:
        """Start with zeros.

        Args:
            width: values in a row.
            gather: ``(n, k)`` of this rank to ``(world_size, n, k)``, float64 on the CPU; collective.
        """
        self._width = width
        self._gather = gather
        self._pending: list[tuple[Number, ...]] = []
        self.epoch = (0.0,) * width
        self.epoch_steps = 0
        self._interval = (0.0,) * width
        self.interval_steps = 0
        self.append: Callable[[tuple[Number, ...]], None] = self._pending.append
        """Add one step's values on this rank.

        They are detached zero-dim tensors, on any device, or numbers, and are read later: their memory must
        not be changed. All ranks append for the same steps.
        """

    def add(self, row: Iterable[float]) -> None:
        """Add one step's values over all ranks, which were added up in rank order, in float64."""
        values = list(row)
        self.epoch = _added(self.epoch, values)
        self._interval = _added(self._interval, values)
        self.epoch_steps += 1
        self.interval_steps += 1

    def flush(self) -> None:
        """Add the pending steps to the totals; the only wait for the device. Collective."""
        if not self._pending:
            return
        ranks = self._gather(stacked(self._pending))
        self._pending.clear()
        rows = ranks[0]
        for rank_rows in ranks[1:]:
            rows = rows + rank_rows
        for row in rows.tolist():
            self.add(row)

    def take_interval(self) -> tuple[float, ...]:
        """The totals since the last call, pending steps included; starts a new interval. Collective."""
        self.flush()
        totals, self._interval, self.interval_steps = self._interval, (0.0,) * self._width, 0
        return totals

    def take_epoch(self) -> tuple[float, ...]:
        """The totals of the epoch, pending steps included; starts a new one. Collective.

        The interval goes on.
        """
        self.flush()
        totals, self.epoch, self.epoch_steps = self.epoch, (0.0,) * self._width, 0
        return totals

    def state_dict(self) -> dict[str, Any]:
        """The global totals, equal on all ranks.

        Raises:
            RuntimeError: steps are pending; `flush` on all ranks first.
        """
        if self._pending:
            raise RuntimeError(
                f"{len(self._pending)} steps are not in the totals. Call flush() on all ranks before saving."
            )
        return {
            "epoch": list(self.epoch),
            "epoch_steps": self.epoch_steps,
            "interval": list(self._interval),
            "interval_steps": self.interval_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from totals; steps that are pending are dropped.

        Raises:
            StateMismatchError: they are of other metrics.
        """
        if len(state_dict["epoch"]) != self._width:
            raise StateMismatchError(
                f"The checkpoint holds sums of {len(state_dict['epoch'])} values a step, this run has "
                f"{self._width}. Resume with the same task and metrics."
            )
        self._pending.clear()
        self.epoch = tuple(state_dict["epoch"])
        self.epoch_steps = state_dict["epoch_steps"]
        self._interval = tuple(state_dict["interval"])
        self.interval_steps = state_dict["interval_steps"]


def stacked(rows: Sequence[tuple[Number, ...]]) -> Tensor:
    """All rows as ``(n, k)`` in float64 on the CPU, with one copy from the device a column."""
    return torch.stack([_column(column) for column in zip(*rows, strict=True)], dim=1)


def _column(values: tuple[Number, ...]) -> Tensor:
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack(list(values)).to("cpu", torch.float64)  # type: ignore[arg-type]
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _added(totals: tuple[float, ...], row: list[float]) -> tuple[float, ...]:
    return tuple([total + value for total, value in zip(totals, row, strict=True)])
