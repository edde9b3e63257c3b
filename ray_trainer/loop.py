"""The order of everything inside a training step."""

import math
import operator
import time
from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import Tier
from ray_trainer.data.source import Batch, BatchSource, StepBatch, to_device
from ray_trainer.errors import DivergenceError
from ray_trainer.forward import Forward
from ray_trainer.gradients import GradientAccumulator, GradientMonitor, Verdict
from ray_trainer.hooks import StepRecord
from ray_trainer.losses import LossResult
from ray_trainer.metrics.sums import MetricSums, stacked
from ray_trainer.runtime import Runtime, Stop
from ray_trainer.seeding import seed_step
from ray_trainer.state import Progress
from ray_trainer.task import BatchResult, Task


class TrainingLoop:
    """Runs the steps of an epoch; yields at each completed one, the only safe point.

    One step::

        seed every generator from (seed, step, rank)
        for each micro-batch: forward → loss sum, count → backward (gradients of the sum)
        agree with all ranks on the count, the clock and wishes to stop
        one gradient norm, of the mean over the global batch → verdict
        update, or leave the weights alone
        progress, metric sums
        yield

    Attributes:
        stop: the wish to stop that all ranks agreed on with the last step.
        busy: where a checkpoint of any rank was still on its way to then.
        is_whole: the model is what the last completed step left, also after an error in the next one.
        batch_losses: of this rank's micro-batches of the last step.
    """

    def __init__(
        self,
        forward: Forward,
        task: Task,
        *,
        accumulator: GradientAccumulator,
        monitor: GradientMonitor,
        progress: Progress,
        sums: MetricSums,
        runtime: Runtime,
        seed: int,
        saving_to: Callable[[], Tier],
    ) -> None:
        self._forward = forward
        self._task = task
        self._accumulator = accumulator
        self._monitor = monitor
        self._progress = progress
        self._sums = sums
        self._runtime = runtime
        self._seed = seed
        self._saving_to = saving_to
        self._rank = distributed.rank()
        self._world_size = distributed.world_size()
        self._statistics = RunningStatistics(forward.model, keeps_others=self._world_size > 1)
        self._clock = time.monotonic()
        self._buckets_settled = self._world_size <= 2 or forward.is_sharded
        self._is_replicated = runtime.survivor is not None
        self.stop = Stop.NONE
        self.busy = Tier.NONE
        self.is_whole = True
        self._data_wait_s = 0.0
        self._divergence: DivergenceError | None = None
        self._row_of_all: list[float] = []
        self.batch_losses: list[LossResult] = []

    def steps(self, source: BatchSource) -> Iterator[StepRecord]:
        """The remaining steps of the epoch in progress. Collective.

        Raises:
            DivergenceError: the gradients were unusable too often in a row; equal on all ranks.
        """
        batches = source.steps(self._progress.epoch, start=self._progress.step_in_epoch)
        self._forward.module.train()
        while True:
            before = time.perf_counter()
            step_batch = next(batches, None)
            self._data_wait_s += time.perf_counter() - before
            if step_batch is None:
                return
            if not self._buckets_settled:
                self._settle_buckets(step_batch)
            yield self._step(step_batch)
            if self._divergence is not None:
                raise self._divergence

    def _step(self, step_batch: StepBatch) -> StepRecord:
        progress = self._progress
        seed_step(self._seed, progress.step, self._rank)
        self._statistics.remember()
        try:
            results = self._accumulate(step_batch)
            row = _row(results)
            local_count = sum(float(result.loss.count) for result in results)
            count, num_samples, seconds = self._agree(local_count, step_batch.num_samples, row)
            mean_count = count / self._world_size  # the exchange of gradients has averaged the sums of the ranks
            norm = float(self._accumulator.norm(mean_count))  # the one wait for the device: a verdict comes first
        except BaseException:
            self._forward.abandon_step()
            self._statistics.undo()
            self._accumulator.discard()
            self.is_whole = self._statistics.are_complete()
            raise

        learning_rate = self._accumulator.learning_rate
        verdict = self._judge(norm) if count else Verdict.SKIP
        self.is_whole = False
        is_updated = verdict is Verdict.STEP and self._accumulator.apply(mean_count, norm)
        if is_updated and self._is_replicated:
            self._sums.add(self._row_of_all)
        elif is_updated:
            self._sums.append(row)
        else:
            self._statistics.put_back()
            self._accumulator.discard()
        progress.complete_step(num_samples, seconds, skipped=not is_updated)
        self.is_whole = True
        return StepRecord(
            step=progress.step,
            epoch=progress.epoch,
            loss_sum=self.batch_losses[-1].sum,
            loss_count=self.batch_losses[-1].count,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_samples=num_samples,
            skipped=not is_updated,
        )

    def _judge(self, norm: float) -> Verdict:
        """Whether the gradients may reach the weights; equal on all ranks, because the norm is."""
        is_searching_scale = not math.isfinite(norm) and self._accumulator.is_searching_scale
        verdict = self._monitor.judge(norm, is_searching_scale)
        if verdict is Verdict.ABORT:
            findings = self._monitor.check_gradients(self._forward.model)
            self._divergence = self._monitor.divergence(norm, findings)
            self._divergence.on_all_ranks = True
        return verdict

    def _accumulate(self, step_batch: StepBatch) -> list[BatchResult]:
        """Forward and backward of this rank's micro-batches; gradients are exchanged after the last."""
        num_real = len(step_batch.micro_batches) if step_batch.num_samples else 0
        *earlier, last = self._forward.begin_step(step_batch.micro_batches)
        results: list[BatchResult] = []
        for micro_batch in earlier:
            with self._forward.without_sync():
                results.append(self._forward_and_backward(micro_batch, len(results) >= num_real))
        results.append(self._forward_and_backward(last, len(results) >= num_real))
        self.batch_losses = [result.loss for result in results[: len(step_batch.micro_batches)]]
        return results

    def _forward_and_backward(self, micro_batch: Batch, weight_zero: bool) -> BatchResult:
        result = self._evaluate(micro_batch)
        if weight_zero:
            result = _weightless(result)
        self._accumulator.backward(result.loss.sum)
        return result

    def _evaluate(self, micro_batch: Batch) -> BatchResult:
        batch = to_device(micro_batch, self._forward.device)
        with self._forward.precision():
            return self._task.evaluate(self._forward.module, batch)

    def _agree(self, count: float, num_samples: int, row: tuple[torch.Tensor | int, ...]) -> tuple[float, int, float]:
        """Count and samples of the global batch and seconds since the last step, equal on all ranks.

        Wishes to stop, and checkpoints that are being written, ride on the same exchange. Where any rank may have
        to go on without another, so do the step's sums and normalisation statistics: each then has all there is.
        """
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        wish, busy = self._runtime.requested_stop(), self._saving_to()
        if self._world_size == 1:
            self.stop, self.busy = wish, busy
            return count, num_samples, seconds
        mine = torch.tensor([[count, num_samples, wish, seconds, busy]], dtype=torch.float64)
        if self._is_replicated:
            others_changed = torch.tensor([[not self._statistics.are_untouched()]])
            mine = torch.cat([mine, others_changed, stacked([row])], dim=1)
        rows = distributed.gather_rows(mine)[:, 0].tolist()
        if self._is_replicated:
            self._statistics.share(with_others=any(row[5] for row in rows))
            self._row_of_all = [reduce(operator.add, column) for column in zip(*(row[6:] for row in rows), strict=True)]
        self.busy = Tier(reduce(operator.or_, (int(row[4]) for row in rows)))
        self.stop = Stop(int(max(row[2] for row in rows)))
        return sum(row[0] for row in rows), int(sum(row[1] for row in rows)), rows[0][3]

    def _settle_buckets(self, step_batch: StepBatch) -> None:
        """Make the exchange of gradients the same in every process of a run, from its first step on.

        ``DistributedDataParallel`` lays its buckets out anew after the first backward pass. A ring reduction
        adds up in an order that depends on the place in the bucket, so with more than two ranks the first
        step after a restart would differ in its last bits. A pass that is thrown away comes first.
        """
        self._buckets_settled = True
        self._statistics.remember()
        try:
            self._evaluate(step_batch.micro_batches[0]).loss.sum.backward()  # type: ignore[no-untyped-call]
        finally:
            self._statistics.undo()
            self._accumulator.discard()

    def take_data_wait_s(self) -> float:
        """Seconds this rank has waited for data since the last call."""
        waited, self._data_wait_s = self._data_wait_s, 0.0
        return waited

    def restart_clock(self) -> None:
        """Training starts now: set-up does not count as time of the first step."""
        self._clock = time.monotonic()


def _weightless(result: BatchResult) -> BatchResult:
    """The result of a stand-in batch, which counts for nothing."""
    loss = LossResult(result.loss.sum * 0.0, 0)
    return BatchResult(loss, tuple((metric * 0, 0) for metric, _ in result.metrics))


def _row(results: list[BatchResult]) -> tuple[torch.Tensor | int, ...]:
    """Loss sum and count and each metric's, over the micro-batches of a step."""
    rows = [(r.loss.sum.detach(), r.loss.count, *(value for pair in r.metrics for value in pair)) for r in results]
    if len(rows) == 1:
        return rows[0]
    return tuple(sum(column[1:], start=column[0]) for column in zip(*rows, strict=True))


class RunningStatistics:
    """The running means and variances of normalisation layers, as they were before the step.

    A forward pass changes them, so a step that is not carried out must put them back: a batch with a NaN
    would stay in them for ever.

    Args:
        model: whose layers they belong to.
        keeps_others: remember the model's other buffers as well, for `undo`.
    """

    def __init__(self, model: nn.Module, keeps_others: bool = False) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._live = [buffer for layer in layers for buffer in layer.buffers()]
        self._saved = [buffer.clone() for buffer in self._live]
        known = {id(buffer) for buffer in self._live}
        self._model = model
        self._others = [buffer for buffer in model.buffers() if id(buffer) not in known]
        self._versions = [buffer._version for buffer in self._others]
        self._saved_others = [buffer.clone() for buffer in self._others] if keeps_others else []

    def remember(self) -> None:
        """Keep the values of this moment."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)
        if self._saved_others and not self.are_untouched():
            torch._foreach_copy_(self._saved_others, self._others)
        self._versions = [buffer._version for buffer in self._others]

    def are_complete(self) -> bool:
        """Whether no other buffer of the model was replaced, or written without having been kept."""
        there = {id(buffer) for buffer in self._model.buffers()}
        is_there = all(id(buffer) in there for buffer in (*self._live, *self._others))
        return is_there and (bool(self._saved_others) or self.are_untouched())

    def are_untouched(self) -> bool:
        """Whether the model's other buffers are as they were."""
        return self._versions == [buffer._version for buffer in self._others]

    def share(self, with_others: bool) -> None:
        """Take over those of rank 0, as they are in a checkpoint. Collective where there are any.

        Args:
            with_others: the model's other buffers as well; equal on all ranks.
        """
        distributed.broadcast_all([*self._live, *self._others] if with_others else self._live, source=0)

    def undo(self) -> None:
        """Put back all that was kept: the step was broken off."""
        self.put_back()
        if self._saved_others:
            torch._foreach_copy_(self._others, self._saved_others)

    def put_back(self) -> None:
        """Return to the values that were kept."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)
