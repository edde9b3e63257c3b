"""Validation: the whole data set once, every sample counted once, whatever the number of ranks."""

import torch

from ray_trainer import distributed, pulse
from ray_trainer.data.source import Batch, BatchSource, StepBatch, to_device
from ray_trainer.forward import Forward
from ray_trainer.metrics.tracker import MetricsTracker
from ray_trainer.pulse import Phase
from ray_trainer.runtime import Runtime, Stop
from ray_trainer.seeding import isolated_rng
from ray_trainer.task import Task


class ValidationLoop:
    """Measures the model on validation data without leaving a trace in it or in any generator."""

    def __init__(self, forward: Forward, task: Task, runtime: Runtime, in_order: bool = False) -> None:
        """Prepare to measure.

        Args:
            forward: the model.
            task: says what is measured.
            runtime: knows of wishes to stop.
            in_order: add up micro-batches in their order in the data, whichever rank has which; their places are told.
        """
        self._forward = forward
        self._task = task
        self._runtime = runtime
        self._in_order = in_order
        self.stop = Stop.NONE

    def run(self, source: BatchSource) -> dict[str, float] | None:
        """Mean loss and metrics over all samples and ranks. Collective.

        Returns:
            ``loss``, the task's metrics and ``perplexity`` where the task has them; None if interrupted.
        """
        model = self._forward.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), isolated_rng():
                totals = self._totals(source)
        finally:
            model.train(was_training)
        return None if totals is None else self._means(totals)

    def _totals(self, source: BatchSource) -> list[float] | None:
        rows: list[tuple[torch.Tensor | int, ...]] = []  # read at the end: no wait for the device before
        places: list[tuple[int, int]] = []
        for step, step_batch in enumerate(source.steps(epoch=0)):
            pulse.beat(Phase.VALIDATION)
            rows += self._measure_all(step_batch)
            places += [(step, place) for place in step_batch.places]
            self._agree_on_stop()
            if self.stop is not Stop.NONE:
                return None
        pulse.beat(Phase.OTHER)  # a device computes all that it was given meanwhile
        values = [[float(value) for value in row] for row in rows]
        if self._in_order:
            ranks = distributed.gather_objects(list(zip(places, values, strict=True)))
            return self._added([row for _, row in sorted(row for of_rank in ranks for row in of_rank)])
        mine = torch.tensor([self._added(values)], dtype=torch.float64)
        return self._added(distributed.gather_rows(mine)[:, 0].tolist())

    def _added(self, rows: list[list[float]]) -> list[float]:
        zeros = [0.0] * (2 + 2 * len(self._task.metric_names))
        return [sum(column) for column in zip(zeros, *rows, strict=True)]

    def _measure_all(self, step_batch: StepBatch) -> list[tuple[torch.Tensor | int, ...]]:
        num_real = len(step_batch.micro_batches) if step_batch.num_samples else 0
        passes = self._forward.padded(step_batch.micro_batches, num_real)
        return [self._measure(micro_batch) for micro_batch in passes][:num_real]

    def _measure(self, micro_batch: Batch) -> tuple[torch.Tensor | int, ...]:
        batch = to_device(micro_batch, self._forward.device)
        with self._forward.precision():
            result = self._task.evaluate(self._forward.model, batch)
        return tuple(number for pair in (result.loss, *result.metrics) for number in pair)

    def _agree_on_stop(self) -> None:
        mine = torch.tensor([[self._runtime.requested_stop()]], dtype=torch.float64)
        self.stop = Stop(int(distributed.gather_rows(mine).max()))

    def _means(self, totals: list[float]) -> dict[str, float]:
        names = ("loss", *self._task.metric_names)
        means = {
            name: totals[2 * place] / totals[2 * place + 1] if totals[2 * place + 1] else float("nan")
            for place, name in enumerate(names)
        }
        if self._task.has_perplexity:
            means["perplexity"] = MetricsTracker.compute_perplexity(means["loss"])
        return means
