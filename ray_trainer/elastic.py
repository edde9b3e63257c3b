"""Steps whose result does not depend on the number of ranks, to the last bit: ``determinism: elastic``."""

from dataclasses import replace
from typing import Any

import torch

from ray_trainer import distributed, pulse
from ray_trainer.data.cutting import cut
from ray_trainer.data.source import Batch, StepBatch
from ray_trainer.exchange import Agreed
from ray_trainer.forward import RunningStatistics
from ray_trainer.gradients.tree import GradientTree
from ray_trainer.loop import TrainingLoop
from ray_trainer.losses import LossResult
from ray_trainer.metrics.sums import stacked
from ray_trainer.seeding import seed_step
from ray_trainer.task import BatchResult
from ray_trainer.task.results import joined, row_of

_FILLS_UP = -1.0  # in place of a place


class ElasticLoop(TrainingLoop):
    """Runs steps that are the same whichever rank computes which micro-batch of the global batch.

    Micro-batches are dealt out whole. Each starts from the same: generators are seeded from its place in the step
    rather than from the rank, and buffers are what they were when the step began. Gradients, loss and metrics are
    added up in the order of places. The buffers that the first micro-batch leaves are those of the step.

    Args:
        options: of `TrainingLoop`.
        micro_batches_a_step: that a rank has at most.
        more_options: of `TrainingLoop`.
    """

    def __init__(self, *options: Any, micro_batches_a_step: int, **more_options: Any) -> None:
        super().__init__(*options, **more_options)
        self._most = micro_batches_a_step
        self._tree = GradientTree(self._forward.model)
        self._statistics = RunningStatistics(self._forward.model, keeps_others=True)
        self._first_buffers: list[torch.Tensor] = []
        self._places: list[int] = []
        self._rows: list[tuple[torch.Tensor | int, ...]] = []
        self._averaged_over = 1
        self._buckets_settled = True
        self._is_replicated = True

    def _accumulate(self, step_batch: StepBatch) -> list[BatchResult]:
        """Forward and backward of this rank's micro-batches, one by one; nothing is exchanged yet."""
        self._places, self._rows, self.batch_losses = [], [], []
        results: list[BatchResult] = []
        if not step_batch.num_samples:
            results.append(self._nothing())
            self.batch_losses.append(results[0].loss)
        for index, place in enumerate(step_batch.places):
            pieces = cut(step_batch.micro_batches[index], self._progress.pieces_now)
            self._processed = pieces[0]
            of_it = self._compute(place, index, pieces)
            self.batch_losses.append(joined([result.loss for result in of_it]))
            results += of_it
        self._watch.leave()
        return results

    def _nothing(self) -> BatchResult:
        """What a rank without samples adds."""
        zero = torch.zeros((), device=self._forward.device, requires_grad=True)
        self._accumulator.backward(zero)  # the step is one of this rank as well
        return BatchResult(LossResult(zero.detach(), 0), tuple((zero.detach(), 0) for _ in self._task.metric_names))

    def _compute(self, place: int, index: int, pieces: list[Batch]) -> list[BatchResult]:
        seed_step(self._seed, self._progress.step, place)
        self._statistics.undo()
        results = [self._forward_and_backward(piece, index) for piece in pieces]
        self._tree.take(place)
        if not self._places:
            self._first_buffers = [buffer.clone() for buffer in self._forward.model.buffers()]
        self._places.append(place)
        self._rows.append(row_of(results))
        return results

    def _agree(self, results: list[BatchResult], row: tuple[torch.Tensor | int, ...], num_samples: int) -> Agreed:
        """Bring together what the micro-batches of all ranks came to."""
        rows, places, have_all = self._gather_rows(len(row))
        totals = [sum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * len(row)
        if rows:
            self._tree.combine(places, have_all)
            self._share_buffers(owner=next(rank for rank, of_rank in enumerate(places) if of_rank))
        agreed = self._exchange.agree(totals[1], num_samples, totals[0])
        pulse.beat(pulse.Phase.UPDATE)
        return replace(agreed, count=totals[1], loss_sum=totals[0], shared=tuple(totals))

    def _gather_rows(self, width: int) -> tuple[list[list[float]], list[list[int]], bool]:
        """Sums and counts of each micro-batch in their order, the places of each rank, and `GradientTree.has_all`."""
        table = torch.full((self._most, 2 + width), _FILLS_UP, dtype=torch.float64)
        if self._rows:
            table[: len(self._rows), 0] = torch.tensor(self._places, dtype=torch.float64)
            table[: len(self._rows), 1] = float(self._tree.has_all)
            table[: len(self._rows), 2:] = stacked(self._rows)
        by_rank = [[row for row in rows if row[0] != _FILLS_UP] for rows in distributed.gather_rows(table).tolist()]
        rows = sorted(row for rows in by_rank for row in rows)
        places = [[int(row[0]) for row in of_rank] for of_rank in by_rank]
        return [row[2:] for row in rows], places, all(row[1] for row in rows)

    def _share_buffers(self, owner: int) -> None:
        buffers = list(self._forward.model.buffers())
        if buffers and distributed.rank() == owner:
            torch._foreach_copy_(buffers, self._first_buffers)
        if distributed.world_size() > 1:
            distributed.broadcast_all(buffers, owner)

    def _break_off(self) -> None:
        """Leave no trace of a step that cannot be finished."""
        self._tree.discard()
        super()._break_off()
