"""What becomes of the results of several batches."""

from collections.abc import Sequence

import torch

from ray_trainer.losses import LossResult
from ray_trainer.task.task import BatchResult


def joined(losses: Sequence[LossResult]) -> LossResult:
    """The loss of a micro-batch that was processed in pieces."""
    return LossResult(sum(loss.sum for loss in losses[1:]) + losses[0].sum, sum(loss.count for loss in losses))


def weightless(result: BatchResult) -> BatchResult:
    """The result of a stand-in batch, which counts for nothing."""
    loss = LossResult(result.loss.sum * 0.0, 0)
    return BatchResult(loss, tuple((metric * 0, 0) for metric, _ in result.metrics))


def row_of(results: Sequence[BatchResult]) -> tuple[torch.Tensor | int, ...]:
    """Loss sum and count and each metric's, over some batches; detached."""
    rows = [(r.loss.sum.detach(), r.loss.count, *(value for pair in r.metrics for value in pair)) for r in results]
    if len(rows) == 1:
        return rows[0]
    return tuple(sum(column[1:], start=column[0]) for column in zip(*rows, strict=True))
