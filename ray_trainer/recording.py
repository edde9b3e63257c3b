"""From steps and validations to numbers: running sums, the history, the rows on storage, the display."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_trainer import distributed
from ray_trainer.config import TrainingConfig
from ray_trainer.data.ordered import OrderedSource
from ray_trainer.hooks import StepRecord
from ray_trainer.journal import Journal
from ray_trainer.metrics import ProgressRecord
from ray_trainer.metrics.sums import MetricSums
from ray_trainer.metrics.tracker import MetricsTracker
from ray_trainer.runtime import Runtime
from ray_trainer.setup import Setup
from ray_trainer.state import Progress
from ray_trainer.stragglers import Straggler
from ray_trainer.task import Task
from ray_trainer.triggers import EarlyStopping

logger = logging.getLogger(__name__)

SHOW_INTERVAL_S = 0.5
_TOLD = 20


@dataclass(frozen=True)
class Books:
    """Where numbers are kept.

    Attributes:
        sums: of the epoch in progress and since the last log.
        tracker: the history, a row an epoch.
        journal: rows on storage.
        early_stopping: judges what is monitored.
    """

    sums: MetricSums
    tracker: MetricsTracker
    journal: Journal
    early_stopping: EarlyStopping


@dataclass(frozen=True)
class Means:
    """Metrics of one split after a step; empty before the first.

    Attributes:
        step: completed steps when they were taken.
        values: by plain name.
    """

    step: int = -1
    values: dict[str, float] = field(default_factory=dict)

    def at(self, step: int, prefix: str) -> dict[str, float]:
        """The values if they are of this step, with their split's prefix."""
        return {f"{prefix}_{name}": value for name, value in self.values.items()} if self.step == step else {}


class Recorder:
    """Turns what happened into metrics and passes them on. Means are over all samples, tokens and ranks.

    Its state is what is known of the current step, so that a run that goes on from there knows it too.
    """

    def __init__(
        self,
        config: TrainingConfig,
        setup: Setup,
        task: Task,
        books: Books,
        progress: Progress,
        runtime: Runtime,
    ) -> None:
        self.progress = progress
        self._train_source = setup.sources.train
        self._total_steps = setup.limits.total_steps
        self._monitor = setup.monitor
        self._names = ("loss", *task.metric_names)
        self._has_perplexity = task.has_perplexity
        self._epochs = setup.limits.epochs
        self._log_every_n_steps = config.log_every_n_steps
        self._books = books
        self._runtime = runtime
        self._train = Means()
        self._val = Means()
        self._row_step = 0
        self._learning_rate = 0.0
        self._gradient_norm = 0.0
        self._pace = Pace()

    def step(self, record: StepRecord, data_wait_s: float) -> None:
        """Log a step where one is due. Collective."""
        self._pace.count(record.num_samples, data_wait_s)
        self._learning_rate, self._gradient_norm = record.learning_rate, record.gradient_norm
        if record.skipped:
            why = {"gradient_norm": record.gradient_norm} | ({"reason": record.reason} if record.reason else {})
            self._books.journal.event("step_skipped", record.step, record.epoch, **why, **self._bad_samples(record))
        if record.step % self._log_every_n_steps == 0:
            self._log_row()
        if self._pace.display_is_due():
            self._runtime.show(self._progress_record())

    def _bad_samples(self, record: StepRecord) -> dict[str, list[str]]:
        """Which samples a step without usable gradients owes that to, where it is their own numbers."""
        source = self._train_source
        blames_data = record.reason is not None and not math.isfinite(record.gradient_norm)
        if not blames_data or distributed.rank() or not isinstance(source, OrderedSource):
            return {}
        places = source.bad_samples(record.epoch, self.progress.step_in_epoch - 1, distributed.world_size())[:_TOLD]
        if places:
            logger.warning(
                "Step %d was skipped, for its samples hold numbers that are none: %s. Repair them, or filter them out.",
                record.step,
                "; ".join(places),
            )
        return {"bad_samples": places} if places else {}

    def straggler(self, straggler: Straggler) -> None:
        """Tell that a rank is slow."""
        progress = self.progress
        self._books.journal.event("straggler", progress.step, progress.last_epoch, **asdict(straggler))

    def validation(self, means: Mapping[str, float]) -> None:
        """Keep, log and judge a validation of the last completed step."""
        progress = self.progress
        self._val = Means(progress.step, dict(means))
        self._books.journal.metrics("val", progress.step, progress.epoch, means)
        self._judge(self._val.at(progress.step, "val"))
        self._runtime.show(self._progress_record())

    @property
    def has_validated(self) -> bool:
        """The last completed step is validated."""
        return self._val.step == self.progress.step

    @property
    def row_step(self) -> int:
        """The step of the newest row of training."""
        return self._row_step

    @property
    def has_closed(self) -> bool:
        """The last completed step is in the history."""
        return self._train.step == self.progress.step

    def epoch(self) -> None:
        """Add the row of the epoch in progress to the history, and that of its last step. Collective."""
        progress, books = self.progress, self._books
        if self._row_step != progress.step:
            self._log_row()
        books.sums.flush()
        self._train = Means(progress.step, self._means(books.sums.epoch))
        books.tracker.log_epoch(
            progress.epoch,
            self._train.values,
            self._val.values if self._val.step == progress.step else None,
            learning_rate=self._learning_rate,
            gradient_norm=self._gradient_norm,
            epoch_duration=progress.epoch_elapsed_s,
        )
        self._judge(self._train.at(progress.step, "train"))

    def metrics(self) -> dict[str, float]:
        """What is known of the last completed step: its validation, its epoch if that is closed."""
        step = self.progress.step
        return {**self._train.at(step, "train"), **self._val.at(step, "val")}

    def epoch_metrics(self) -> dict[str, float]:
        """As `metrics`, and those of training by their plain names as well."""
        return {**self._train.values, **self.metrics()}

    def flush(self) -> None:
        """Bring the sums up to date, as a save needs them. Collective."""
        self._books.sums.flush()

    def reset_epoch(self) -> None:
        """A new epoch begins. Collective."""
        self._books.sums.take_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the newest step, validation and epoch."""
        return {
            "train": [self._train.step, dict(self._train.values)],
            "val": [self._val.step, dict(self._val.values)],
            "row_step": self._row_step,
            "learning_rate": self._learning_rate,
            "gradient_norm": self._gradient_norm,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._train = Means(*state_dict["train"])
        self._val = Means(*state_dict["val"])
        self._row_step = state_dict["row_step"]
        self._learning_rate = state_dict["learning_rate"]
        self._gradient_norm = state_dict["gradient_norm"]

    def _judge(self, metrics: Mapping[str, float]) -> None:
        if self._monitor in metrics and self._books.early_stopping.should_stop(metrics[self._monitor]):
            self.progress.stop_reason = f"early stopping: {self._monitor} did not improve any more"

    def _log_row(self) -> None:
        """The row of the steps since the last one."""
        totals = self._books.sums.take_interval()
        row = self._means(totals) if totals[1] else {}  # nothing but skipped steps: no number is invented
        self._pace.loss = row.get("loss", self._pace.loss)
        row |= {"learning_rate": self._learning_rate, "gradient_norm": self._gradient_norm}
        self._row_step = self.progress.step
        self._books.journal.metrics("train", self._row_step, self.progress.epoch, {**row, **self._pace.take_rates()})

    def _means(self, totals: tuple[float, ...]) -> dict[str, float]:
        means = {
            name: totals[2 * place] / totals[2 * place + 1] if totals[2 * place + 1] else math.nan
            for place, name in enumerate(self._names)
        }
        if self._has_perplexity:
            means["perplexity"] = MetricsTracker.compute_perplexity(means["loss"])
        return means

    def _progress_record(self) -> dict[str, Any]:
        progress, pace = self.progress, self._pace
        left = None if self._total_steps is None else max(0, self._total_steps - progress.step)
        return ProgressRecord(
            epoch=progress.epoch,
            epochs=self._epochs,
            step=progress.step,
            total_steps=self._total_steps,
            loss=pace.loss,
            val_metrics=self._val.values,
            samples_per_s=pace.samples_per_s,
            remaining_s=None if left is None or pace.seconds_a_step is None else left * pace.seconds_a_step,
            num_workers=distributed.world_size(),
        ).to_dict()


class Pace:
    """How fast the steps of this process come, over the last logging interval."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.samples_per_s: float | None = None
        self.seconds_a_step: float | None = None
        self._since = time.monotonic()
        self._steps = 0
        self._samples = 0
        self._data_wait_s = 0.0
        self._shown = self._since

    def count(self, num_samples: int, data_wait_s: float) -> None:
        """One more step."""
        self._steps += 1
        self._samples += num_samples
        self._data_wait_s += data_wait_s

    def take_rates(self) -> dict[str, float]:
        """Samples a second over all ranks, and seconds a step that rank 0 waited for data; a new interval starts."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "samples_per_s": self._samples / seconds,
            "data_wait_s": self._data_wait_s / max(1, self._steps),
        }
        self.samples_per_s, self.seconds_a_step = rates["samples_per_s"], seconds / max(1, self._steps)
        self._since, self._steps, self._samples, self._data_wait_s = now, 0, 0, 0.0
        return rates

    def display_is_due(self) -> bool:
        """Whether the display has waited long enough; starts the wait anew if so."""
        now = time.monotonic()
        if now - self._shown < SHOW_INTERVAL_S:
            return False
        self._shown = now
        return True
