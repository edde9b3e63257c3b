"""The order of everything inside a training step."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ray_trainer import distributed, pulse
from ray_trainer.checkpoint import Tier
from ray_trainer.data.batch import count_samples
from ray_trainer.data.cutting import cut
from ray_trainer.data.source import Batch, BatchSource, StepBatch, to_device
from ray_trainer.errors import DivergenceError, MemoryShortageError
from ray_trainer.exchange import Agreed, StepExchange
from ray_trainer.forward import Forward, RunningStatistics
from ray_trainer.gradients import GradientAccumulator, GradientMonitor, Verdict
from ray_trainer.hooks import StepRecord
from ray_trainer.losses import LossResult
from ray_trainer.metrics.sums import MetricSums, stacked
from ray_trainer.pulse import Phase
from ray_trainer.runtime import Runtime
from ray_trainer.seeding import seed_step
from ray_trainer.shortage import explained
from ray_trainer.state import Progress
from ray_trainer.task import BatchResult, Task
from ray_trainer.task.results import joined, row_of, weightless


class Watch(Protocol):
    """Is told where this rank is in a step, to know what to make of it when it gets no further."""

    def enter(self, micro_batch: int) -> None:
        """The forward pass of a micro-batch begins."""

    def enter_backward(self, micro_batch: int) -> None:
        """Its backward pass begins."""

    def leave(self) -> None:
        """All passes of the step are done."""

    def failed(self, error: BaseException) -> None:
        """This was raised."""


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
        agreed: what all ranks told each other with the last step.
        wants_rollback: the last step asks to go back to a state before it; agreed on as well.
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
        may_retry: Callable[[BaseException], bool],
        watch: Watch,
    ) -> None:
        self._forward = forward
        self._task = task
        self._accumulator = accumulator
        self._monitor = monitor
        self._progress = progress
        self._sums = sums
        self._seed = seed
        self._exchange = StepExchange(runtime, saving_to)
        self._may_retry = may_retry
        self._watch = watch
        self._needs_loss = monitor.needs_loss
        self._rank = distributed.rank()
        world_size = distributed.world_size()
        self._averaged_over = world_size  # by the exchange of gradients
        self._statistics = RunningStatistics(forward.model, keeps_others=world_size > 1)
        self._buckets_settled = world_size <= 2 or forward.is_sharded
        self._is_replicated = runtime.survivor is not None
        self.agreed = Agreed()
        self.wants_rollback = False
        self.is_whole = True
        self._data_wait_s = 0.0
        self._divergence: DivergenceError | None = None
        self._processed: Batch = []
        self.batch_losses: list[LossResult] = []

    def steps(self, source: BatchSource) -> Iterator[StepRecord]:
        """The remaining steps of the epoch in progress. Collective.

        Raises:
            DivergenceError: the gradients were unusable too often in a row; equal on all ranks.
        """
        batches = source.steps(self._progress.epoch, start=self._progress.step_in_epoch)
        self._forward.module.train()
        while True:
            pulse.beat(Phase.DATA)
            before = time.perf_counter()
            step_batch = next(batches, None)
            self._data_wait_s += time.perf_counter() - before
            if step_batch is None:
                pulse.beat(Phase.OTHER)
                return
            if not self._buckets_settled:
                self._settle_buckets(step_batch)
            yield self._step(step_batch)
            if self._divergence is not None:
                raise self._divergence

    def _step(self, step_batch: StepBatch) -> StepRecord:
        progress = self._progress
        pulse.step(progress.step)
        seed_step(self._seed, progress.step, self._rank)
        self._statistics.remember()
        try:
            results = self._accumulate_within_memory(step_batch)
        except BaseException as error:
            self._break_off()
            self._watch.failed(error)
            raise
        try:
            row = row_of(results)
            agreed = self.agreed = self._agree(results, row, step_batch.num_samples)
            mean_count = agreed.count / self._averaged_over
            norm = float(self._accumulator.norm(mean_count))  # the one wait for the device: a verdict comes first
        except BaseException:
            self._break_off()
            raise

        learning_rate = self._accumulator.learning_rate
        verdict = self._judge(norm, agreed.loss_sum / agreed.count) if agreed.count else Verdict.SKIP
        self.wants_rollback = verdict is Verdict.ROLLBACK
        self.is_whole = False
        is_updated = verdict is Verdict.STEP and self._accumulator.apply(mean_count, norm)
        if is_updated and self._is_replicated:
            self._sums.add(agreed.shared)
        elif is_updated:
            self._sums.append(row)
        else:
            self._statistics.put_back()
            self._accumulator.discard()
        progress.complete_step(agreed.num_samples, agreed.seconds, skipped=not is_updated)
        self.is_whole = True
        self._processed = []
        pulse.beat(Phase.OTHER)
        return StepRecord(
            step=progress.step,
            epoch=progress.epoch,
            loss_sum=self.batch_losses[-1].sum,
            loss_count=self.batch_losses[-1].count,
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_samples=agreed.num_samples,
            skipped=not is_updated,
            reason=self._monitor.finding if agreed.count else None,
        )

    def _judge(self, norm: float, loss: float) -> Verdict:
        """Whether the gradients may reach the weights; equal on all ranks, because norm and loss are."""
        is_searching_scale = not math.isfinite(norm) and self._accumulator.is_searching_scale
        verdict = self._monitor.judge(norm, is_searching_scale, loss)
        if verdict is Verdict.ABORT:
            findings = self._monitor.check_gradients(self._forward.model)
            self._divergence = self._monitor.divergence(norm, findings)
            self._divergence.on_all_ranks = True
        return verdict

    def _break_off(self) -> None:
        """Leave no trace of a step that cannot be finished."""
        self._forward.abandon_step()
        self._statistics.undo()
        self._accumulator.discard()
        self.is_whole = self._statistics.are_complete()

    def _accumulate_within_memory(self, step_batch: StepBatch) -> list[BatchResult]:
        """As `_accumulate`; again, in smaller pieces, where memory does not suffice and that is wanted."""
        while True:
            try:
                return self._accumulate(step_batch)
            except Exception as error:
                may_retry = self._may_retry(error)
                self._break_off()
                if not may_retry or not self.is_whole:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what takes the memory
            seed_step(self._seed, self._progress.step, self._rank)
            self._statistics.remember()

    def _accumulate(self, step_batch: StepBatch) -> list[BatchResult]:
        """Forward and backward of this rank's micro-batches; gradients are exchanged after the last."""
        batches, parts = step_batch.micro_batches, None
        pieces = self._pieces(step_batch)
        if pieces > 1:
            parts = [cut(micro_batch, pieces) for micro_batch in batches]
            batches = [piece for part in parts for piece in part]
        self._processed = batches[0]
        num_real = len(batches) if step_batch.num_samples else 0
        *earlier, last = self._forward.begin_step(batches)
        results: list[BatchResult] = []
        for micro_batch in earlier:
            with self._forward.without_sync():
                results.append(self._forward_and_backward(micro_batch, len(results) // pieces, len(results) < num_real))
        results.append(self._forward_and_backward(last, len(results) // pieces, len(results) < num_real))
        self._watch.leave()
        self.batch_losses = [result.loss for result in results[: len(batches)]]
        if parts is not None:
            losses = iter(self.batch_losses)
            self.batch_losses = [joined([next(losses) for _ in part]) for part in parts]
        return results

    def _pieces(self, step_batch: StepBatch) -> int:
        """In how many pieces a micro-batch is processed; a stand-in is not cut."""
        return self._progress.pieces_now if step_batch.num_samples else 1

    def _forward_and_backward(self, micro_batch: Batch, index: int, counts: bool = True) -> BatchResult:
        """Both passes of a micro-batch of this rank, or of a piece of it; one that counts for nothing stands in."""
        self._watch.enter(index)
        pulse.beat(Phase.FORWARD)
        result = self._evaluate(micro_batch)
        self._watch.enter_backward(index)
        if not counts:
            result = weightless(result)
        pulse.beat(Phase.BACKWARD)
        self._accumulator.backward(result.loss.sum)
        return result

    def _evaluate(self, micro_batch: Batch) -> BatchResult:
        batch = to_device(micro_batch, self._forward.device)
        with self._forward.precision():
            return self._task.evaluate(self._forward.module, batch)

    def _agree(self, results: list[BatchResult], row: tuple[torch.Tensor | int, ...], num_samples: int) -> Agreed:
        """Tell the other ranks of this one's part of the step, and learn the whole.

        Where any rank may have to go on without another, the step's sums and the model's buffers are shared as well:
        each rank then has all there is.
        """
        count = sum(float(result.loss.count) for result in results)
        loss = sum(float(result.loss.sum.detach()) for result in results) if self._needs_loss else 0.0
        shared = stacked([row])[0].tolist() if self._is_replicated else []
        agreed = self._exchange.agree(count, num_samples, loss, shared)
        pulse.beat(Phase.UPDATE)
        if self._is_replicated:
            self._statistics.share()
        return agreed

    def _settle_buckets(self, step_batch: StepBatch) -> None:
        """Make the exchange of gradients the same in every process of a run, from its first step on.

        ``DistributedDataParallel`` lays its buckets out anew after the first backward pass. A ring reduction
        adds up in an order that depends on the place in the bucket, so with more than two ranks the first
        step after a restart would differ in its last bits. A pass that is thrown away comes first.
        """
        self._buckets_settled = True
        pulse.beat(Phase.FORWARD)
        self._statistics.remember()
        self._processed = cut(step_batch.micro_batches[0], self._pieces(step_batch))[0]
        self._watch.enter(0)
        try:
            loss = self._evaluate(self._processed).loss.sum
            self._watch.enter_backward(0)
            loss.backward()  # type: ignore[no-untyped-call]
            self._watch.leave()
        except BaseException as error:
            self._watch.failed(error)
            self._may_retry(error)  # with the next start: memory may not suffice here already
            raise
        finally:
            self._statistics.undo()
            self._accumulator.discard()

    def explained(self, error: Exception) -> MemoryShortageError:
        """What to raise when memory did not suffice in the step in progress, or after the last one."""
        is_in_step = len(self._processed) > 0
        where = f"step {self._progress.step + 1}" if is_in_step else f"what follows step {self._progress.step}"
        num_samples = count_samples(self._processed) if is_in_step else 0
        return explained(error, where, num_samples, self._forward.model, self._accumulator.optimizer)

    def take_data_wait_s(self) -> float:
        """Seconds this rank has waited for data since the last call."""
        waited, self._data_wait_s = self._data_wait_s, 0.0
        return waited

    def restart_clock(self) -> None:
        """Training starts now: set-up does not count as time of the first step."""
        self._exchange.restart_clock()
