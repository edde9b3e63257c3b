"""What a run must keep to go on as if it had never stopped, registered part by part under a name."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from ray_trainer.errors import StateMismatchError


@runtime_checkable
class Stateful(Protocol):
    """A part of the training whose state is kept in checkpoints.

    The state is a nested dict, list or tuple of plain values and tensors; nothing else can be stored.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state at this moment; tensors may be the live ones."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continue from a state that ``state_dict`` returned."""


@dataclass
class Progress:
    """How far a run is. Counts completed things only.

    Attributes:
        epoch: the epoch in progress, from 0; the number of epochs once all of them are done.
        step: completed steps of the run. A step is the treatment of one global batch: an update or a skip.
        step_in_epoch: those of the epoch in progress.
        skipped_steps: steps that left the weights alone because the gradients were not usable.
        samples_seen: samples of completed steps, over all workers.
        elapsed_s: time spent in training, over all attempts, without what was done twice.
        epoch_elapsed_s: the part of it that belongs to the epoch in progress.
        epoch_logged: the epoch in progress is finished, validated and in the history.
        pieces: (step, number of pieces): from that step on each micro-batch is processed in so many pieces.
        stop_reason: why the run ended before its configured length, if it did.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    skipped_steps: int = 0
    samples_seen: int = 0
    elapsed_s: float = 0.0
    epoch_elapsed_s: float = 0.0
    epoch_logged: bool = False
    stop_reason: str | None = None
    pieces: list[list[int]] = field(default_factory=list)

    @property
    def pieces_now(self) -> int:
        """In how many pieces the next step processes a micro-batch."""
        if not self.pieces:
            return 1
        return max((pieces for step, pieces in self.pieces if step <= self.step + 1), default=1)

    @property
    def last_epoch(self) -> int:
        """The epoch that the last completed step belongs to."""
        return max(0, self.epoch - int(self.step_in_epoch == 0 and self.step > 0))

    def complete_step(self, num_samples: int, seconds: float, skipped: bool) -> None:
        """Count one step that all ranks have completed."""
        self.step += 1
        self.step_in_epoch += 1
        self.skipped_steps += int(skipped)
        self.samples_seen += num_samples
        self.elapsed_s += seconds
        self.epoch_elapsed_s += seconds

    def complete_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.step_in_epoch = 0
        self.epoch_elapsed_s = 0.0
        self.epoch_logged = False

    def restart_epoch(self) -> None:
        """Go back to the first sample of the epoch in progress, unless it is finished; its steps stay counted."""
        if not self.epoch_logged:
            self.step_in_epoch = 0
            self.epoch_elapsed_s = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All fields, by name."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over all fields; what is known of memory stays known when a run goes back."""
        known = {(step, pieces) for step, pieces in [*self.pieces, *state_dict.get("pieces", [])]}
        for item in fields(self):
            if item.name != "pieces":  # which checkpoints of 0.1 do not have
                setattr(self, item.name, state_dict[item.name])
        self.pieces = [list(entry) for entry in sorted(known)]


class TrainState:
    """The named parts of a run: what is not registered is not kept, names are the keys.

    There is no random state among them: generators are seeded anew for each step and sample (`seeding`), so
    it follows from the seed and the progress, on every rank.
    """

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self._parts = dict(parts)

    def state_dict(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """The state of every part, or of those that are named."""
        return {name: part.state_dict() for name, part in self._parts.items() if names is None or name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every part.

        Raises:
            StateMismatchError: the names differ, or a part refuses its state; nothing is half-loaded where
                names differ.
        """
        if self._parts.keys() != state_dict.keys():
            raise StateMismatchError(
                f"The checkpoint holds the parts {sorted(state_dict)}, this run has {sorted(self._parts)}. "
                "Resume with the same hooks, schedule and precision, or start a new run."
            )
        self.load_parts(state_dict)

    def load_parts(self, state_dict: Mapping[str, Any]) -> None:
        """Restore those parts that are there, all of which must be registered.

        Raises:
            StateMismatchError: a part refuses its state.
        """
        for name, state in state_dict.items():
            try:
                self._parts[name].load_state_dict(state)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:
                raise StateMismatchError(
                    f"The checkpoint's '{name}' does not fit this run: {error}. "
                    "Was the model or its configuration changed? Start a new run for a new model."
                ) from error
