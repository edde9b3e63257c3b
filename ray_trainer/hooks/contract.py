"""What hooks may implement, what they are told and what they may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Protocol

from torch import Tensor


class Request(Flag):
    """What a hook may ask for by returning it; they combine with ``|``.

    All ranks agree before anything is done, so a request from one rank is enough.
    """

    STOP = auto()
    """End the training after this step, as if it were the last."""
    SAVE = auto()
    """Save a checkpoint after this step."""


NO_REQUEST = Request(0)


@dataclass(slots=True)
class StepRecord:
    """One completed step.

    Attributes:
        step: completed steps of the run, this one included.
        epoch: the epoch it belongs to.
        loss_sum: of this rank's last micro-batch; on the device.
        loss_count: what that sum is over.
        gradient_norm: of the mean gradient over all ranks, before clipping.
        learning_rate: of the update.
        num_samples: over all ranks.
        skipped: the weights were left alone, because the gradients were not usable.
        reason: why they were not, where somebody should know.
    """

    step: int
    epoch: int
    loss_sum: Tensor
    loss_count: Tensor | int
    gradient_norm: float
    learning_rate: float
    num_samples: int
    skipped: bool
    reason: str | None = None

    @property
    def loss(self) -> float:
        """The mean loss of this rank's last micro-batch; NaN without samples. Waits for the device."""
        count = float(self.loss_count)
        return float(self.loss_sum) / count if count else float("nan")


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that is whole and durable.

    Attributes:
        path: where it is.
        step: completed steps in it.
        epoch: the epoch in progress in it.
        metrics: by which checkpoints are compared.
        is_best: none before it was better.
        stall_s: for how long training waited.
        durable_s: from the start of saving until it was safe.
        size_bytes: of all its files.
    """

    path: str
    step: int
    epoch: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False
    stall_s: float = 0.0
    durable_s: float = 0.0
    size_bytes: int = 0


@dataclass(frozen=True)
class ResumeRecord:
    """Where a training continues from.

    Attributes:
        path: the checkpoint.
        step: completed steps in it.
        epoch: the epoch in progress in it.
        tier: what kind of source it was, as ``storage``.
    """

    path: str
    step: int
    epoch: int
    tier: str = "storage"


class TrainingHooks(Protocol):
    """What may be implemented, any subset of it; classes need not inherit from anything.

    They are called on every rank, in the order start → epoch start → batches and steps → validation → log →
    save → epoch end → end. Hooks observe: an exception in one ends the training as any other does.

    A hook with state adds ``state_dict()``, which returns plain data and tensors, and
    ``load_state_dict(state)``; its state is then a part of every checkpoint. On a cluster, a worker that replaces
    one that died goes on with the state of a survivor's hooks.
    """

    def on_training_start(self) -> None:
        """Training is set up, and resumed if it is."""

    def on_resume(self, record: ResumeRecord) -> None:
        """It continues from a checkpoint; right after ``on_training_start``."""

    def on_epoch_start(self, epoch: int) -> None:
        """An epoch begins, counted from 0; not called again when a run is resumed in the middle of it."""

    def on_batch_end(self, batch_idx: int, loss: float) -> Request | None:
        """A micro-batch of this rank is done.

        Args:
            batch_idx: its place in the epoch, from 0; goes on after a resume.
            loss: its mean loss. Computed only for those who implement this; waits for the device.
        """

    def on_step_end(self, record: StepRecord) -> Request | None:
        """A step is done on all ranks; its state is complete."""

    def on_validation_end(self, metrics: dict[str, float]) -> Request | None:
        """A validation is done. Keys are ``val_loss``, ``val_accuracy``, ..."""

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> Request | None:
        """An epoch is done, logged and saved.

        Args:
            epoch: counted from 0.
            metrics: ``train_loss`` ..., ``val_loss`` ... if validated, and ``loss`` ... (those of training).
        """

    def on_checkpoint_saved(self, record: CheckpointSaved) -> None:
        """A checkpoint is durable."""

    def on_exception(self, error: BaseException) -> None:
        """Training ends with this error, which is raised after ``on_training_end``."""

    def on_training_end(self) -> None:
        """Training is over; called always, exactly once, also after an error."""


class DefaultHooks:
    """Hooks that do nothing; a convenient class to inherit from. See `TrainingHooks` for each."""

    def on_training_start(self) -> None:
        """Do nothing."""

    def on_resume(self, record: ResumeRecord) -> None:
        """Do nothing."""

    def on_epoch_start(self, epoch: int) -> None:
        """Do nothing."""

    def on_batch_end(self, batch_idx: int, loss: float) -> Request | None:
        """Do nothing."""

    def on_step_end(self, record: StepRecord) -> Request | None:
        """Do nothing."""

    def on_validation_end(self, metrics: dict[str, float]) -> Request | None:
        """Do nothing."""

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> Request | None:
        """Do nothing."""

    def on_checkpoint_saved(self, record: CheckpointSaved) -> None:
        """Do nothing."""

    def on_exception(self, error: BaseException) -> None:
        """Do nothing."""

    def on_training_end(self) -> None:
        """Do nothing."""


def requested(answer: object) -> Request:
    """What a hook asked for by returning ``answer``; anything but a `Request` is nothing."""
    return answer if isinstance(answer, Request) else NO_REQUEST
