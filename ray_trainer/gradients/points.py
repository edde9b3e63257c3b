"""Which earlier states a run can go back to."""

from typing import Any

from ray_trainer.errors import DivergenceError


class RollbackPoints:
    """The steps whose states are kept, and where each rollback led.

    It knows steps only, not the states. It is a part of the run's state: what a run that was never interrupted
    could go back to, a resumed one knows as well, and gets there even if it has to train up to it again.

    A rollback at step ``d`` to the state of step ``s`` undoes the updates of ``s + 1`` to ``d``. Their batches
    are passed over, and the steps stay counted as skipped ones: steps are never numbered anew.

    Attributes:
        steps: ascending.
        windows: (first, last) of the steps that were undone, for each rollback.
        num_in_a_row: rollbacks since the last point was added.
    """

    def __init__(self, every_n_steps: int = 100, capacity: int = 2, max_in_a_row: int = 3) -> None:
        """Start without any.

        Args:
            every_n_steps: between two points.
            capacity: how many are kept, the newest.
            max_in_a_row: rollbacks without a new point; one more is refused.
        """
        self._every_n_steps = every_n_steps
        self._capacity = capacity
        self._max_in_a_row = max_in_a_row
        self.steps: list[int] = []
        self.windows: list[tuple[int, int]] = []
        self.num_in_a_row = 0

    def is_due(self, step: int) -> bool:
        """Whether the state after this step should become a point.

        After a rollback the training must first have gone on for as long as points lie apart.
        """
        if not self.steps:
            return True
        rested = not self.windows or step >= self.windows[-1][1] + self._every_n_steps
        return step > self.steps[-1] and step % self._every_n_steps == 0 and rested

    def add(self, step: int) -> None:
        """The state after this step is kept now; the oldest of too many is not any more."""
        self.steps = [*self.steps, step][-self._capacity :]
        self.num_in_a_row = 0

    def target(self, step: int, reason: str) -> int:
        """Where to go back to from a step: the newest point, or the one before it if that did not help.

        Raises:
            DivergenceError: going back has not helped too many times; equal on all ranks.
        """
        if self.num_in_a_row >= self._max_in_a_row:
            error = DivergenceError(
                f"Training unstable at step {step} ({reason}): going back to an earlier state "
                f"{self.num_in_a_row} times did not help, the last time to step {self.steps[-1]}. Remediation steps:\n"
                "  - lower learning_rate or max_grad_norm, or lengthen the warm-up\n"
                "  - look for NaN or extreme values in the inputs and labels of these steps\n"
                "  - raise num_rollback_points or rollback_points_every_n_steps to go back further\n"
                "  - raise spike_threshold if these are no spikes, or max_rollbacks if they are rare enough\n"
                "Then give the command again: the run goes on from its newest checkpoint."
            )
            error.on_all_ranks = True
            raise error
        is_again = self.num_in_a_row > 0 and len(self.steps) > 1
        return self.steps[-2 if is_again else -1]

    def go_back(self, target: int, step: int) -> None:
        """Everything after ``target`` up to ``step`` was undone."""
        self.steps = [point for point in self.steps if point <= target]
        self.windows = [window for window in self.windows if window[0] <= target] + [(target + 1, step)]
        self.num_in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        windows = [list(window) for window in self.windows]
        return {"steps": list(self.steps), "windows": windows, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.steps = list(state_dict["steps"])
        self.windows = [(first, last) for first, last in state_dict["windows"]]
        self.num_in_a_row = state_dict["num_in_a_row"]
