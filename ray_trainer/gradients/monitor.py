"""Whether a step's gradients may reach the weights."""

import logging
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Self

from torch import nn

from ray_trainer.config import TrainingConfig
from ray_trainer.errors import DivergenceError
from ray_trainer.gradients.health import GradientHealth, check_gradient_health
from ray_trainer.gradients.points import RollbackPoints
from ray_trainer.gradients.spikes import SpikeDetector

logger = logging.getLogger(__name__)

Action = Literal["skip", "rollback", "raise"]
"""What is done at a step that may not reach the weights."""


class Verdict(Enum):
    """What to do with a step's gradients."""

    STEP = "step"
    SKIP = "skip"
    ROLLBACK = "rollback"
    ABORT = "abort"


@dataclass(frozen=True)
class Policy:
    """What is done at which steps.

    Attributes:
        on_bad_gradients: at a norm that is NaN, infinite or above the threshold.
        on_spike: at a spike; None does not look for any.
    """

    on_bad_gradients: Action = "skip"
    on_spike: Action | None = None

    @property
    def rolls_back(self) -> bool:
        """Whether earlier states are needed."""
        return "rollback" in (self.on_bad_gradients, self.on_spike)


class GradientMonitor:
    """Judges every step by numbers that are equal on all ranks, and counts failures in a row.

    A failure is a norm that is NaN, infinite or above ``explosion_threshold``, or a spike: its step is skipped,
    or the training goes back to an earlier state, as the policy says. A loss that is no number makes a norm that
    is none, see `GradientAccumulator.backward`. Too many failures in a row end the training, since skipping does
    not help any more.

    Attributes:
        finding: what is wrong with the step that was judged last; None where nothing is.
        points: the states to go back to.
    """

    def __init__(
        self,
        max_consecutive_failures: int = 3,
        explosion_threshold: float | None = None,
        vanishing_threshold: float | None = None,
        policy: Policy | None = None,
        spikes: SpikeDetector | None = None,
        points: RollbackPoints | None = None,
    ) -> None:
        """Set the limits.

        Args:
            max_consecutive_failures: that many in a row abort; 1 aborts at the first.
            explosion_threshold: largest norm of the whole mean gradient, before clipping, that is still used;
                in a scan, of one layer. None for no limit.
            vanishing_threshold: layers below it are named in a scan; None for never. No reason to skip.
            policy: what is done about a failure; bad gradients are skipped by default.
            spikes: finds them, where the policy wants to know.
            points: the states to go back to.
        """
        if max_consecutive_failures < 1:
            raise ValueError(f"max_consecutive_failures must be >= 1, not {max_consecutive_failures}. 1: at the first.")
        for name, threshold in (
            ("explosion_threshold", explosion_threshold),
            ("vanishing_threshold", vanishing_threshold),
        ):
            if threshold is not None and not threshold > 0:
                raise ValueError(f"{name} must be > 0 or None, not {threshold}. None turns it off.")
        self.max_consecutive_failures = max_consecutive_failures
        self.explosion_threshold = explosion_threshold
        self.vanishing_threshold = vanishing_threshold
        self.policy = policy or Policy()
        self.points = points or RollbackPoints()
        self.finding: str | None = None
        self.consecutive_failures = 0
        self.total_failures = 0
        self._spikes = spikes or SpikeDetector()

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        """That of a configuration."""
        return cls(
            max_consecutive_failures=config.max_consecutive_bad_steps,
            explosion_threshold=config.gradient_explosion_threshold,
            policy=Policy(config.on_bad_gradients, config.on_spike),
            spikes=SpikeDetector(config.spike_threshold, config.spike_window),
            points=RollbackPoints(
                config.rollback_points_every_n_steps, config.num_rollback_points, config.max_rollbacks
            ),
        )

    @property
    def needs_loss(self) -> bool:
        """Whether `judge` wants to know the loss."""
        return self.policy.on_spike is not None

    def judge(self, norm: float, is_searching_scale: bool = False, loss: float | None = None) -> Verdict:
        """Decide about a step and count it.

        Args:
            norm: of the whole gradient, equal on all ranks.
            is_searching_scale: fp16's loss scale may still be too large; then a norm that is not finite is a
                part of the search: skipped, but no failure.
            loss: mean over the global batch, equal on all ranks, where `needs_loss`.
        """
        self.finding = None
        if is_searching_scale and not math.isfinite(norm):
            return Verdict.SKIP
        action = self._find(norm, loss)
        if action is None:
            self.consecutive_failures = 0
            if self.needs_loss:
                self._spikes.accept(norm, loss)
            return Verdict.STEP
        self.consecutive_failures += 1
        self.total_failures += 1
        if action == "rollback":
            return Verdict.ROLLBACK
        is_enough = self.consecutive_failures >= self.max_consecutive_failures
        return Verdict.ABORT if is_enough or action == "raise" else Verdict.SKIP

    def _find(self, norm: float, loss: float | None) -> Action | None:
        """Keep what is wrong with a step as `finding`; what to do about it, if anything."""
        limit = math.inf if self.explosion_threshold is None else self.explosion_threshold
        if not (math.isfinite(norm) and norm <= limit):
            self.finding = f"gradient norm {norm:.4g}"
            return self.policy.on_bad_gradients
        if self.policy.on_spike is not None:
            self.finding = self._spikes.find(norm, loss)
        return None if self.finding is None else self.policy.on_spike

    def divergence(self, norm: float, findings: GradientHealth | None = None) -> DivergenceError:
        """The error to raise after `Verdict.ABORT`.

        Args:
            norm: the last one that was judged.
            findings: a scan that was made before the gradients were thrown away, to name the layers.
        """
        where = "" if findings is None else f" Found: {findings.describe()}."
        failures = self.consecutive_failures
        return DivergenceError(
            f"Training unstable: {failures} consecutive gradient failure{'s' * (failures != 1)}, "
            f"the last with a gradient norm of {norm}{self._more()}.{where} "
            "The weights are those before them. Remediation steps:\n"
            "  - lower learning_rate, or lengthen the warm-up (warmup_ratio, warmup_steps)\n"
            "  - lower max_grad_norm to clip harder\n"
            "  - look for NaN or extreme values in the inputs and labels of these steps\n"
            "  - with precision fp16-mixed try bf16-mixed or fp32\n"
            "  - set on_bad_gradients or on_spike to 'rollback' to go back to a state before them\n"
            "  - raise max_consecutive_bad_steps if such steps are expected"
        )

    def _more(self) -> str:
        return f" ({self.finding})" if self.finding and "loss" in self.finding else ""

    def check_gradients(self, model: nn.Module) -> GradientHealth:
        """Scan all gradients of a model, layer by layer; log what is wrong. See `check_gradient_health`."""
        health = check_gradient_health(model, self.vanishing_threshold, self.explosion_threshold)
        if not health.is_healthy:
            logger.warning("Gradients of %s: %s.", type(model).__name__, health.describe())
        return health

    def reset_failure_counts(self) -> None:
        """Forget all failures."""
        self.consecutive_failures = 0
        self.total_failures = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts of failures, what steps are compared with, and the states to go back to."""
        return {
            "consecutive_failures": self.consecutive_failures,
            "total_failures": self.total_failures,
            "spikes": self._spikes.state_dict(),
            "points": self.points.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.consecutive_failures = state_dict["consecutive_failures"]
        self.total_failures = state_dict["total_failures"]
        for name, part in (("spikes", self._spikes), ("points", self.points)):
            if name in state_dict:  # checkpoints of 0.1 have neither
                part.load_state_dict(state_dict[name])
