"""Whether a step's gradients may reach the weights, and what is wrong with them when they may not."""

import logging
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ray_trainer.errors import DivergenceError
from ray_trainer.gradients.norms import whole

logger = logging.getLogger(__name__)

_LISTED_LAYERS = 5


class Verdict(Enum):
    """What to do with a step's gradients."""

    STEP = "step"
    SKIP = "skip"
    ABORT = "abort"


@dataclass(frozen=True)
class GradientHealth:
    """What a scan of a model's gradients found, layer by layer.

    Attributes:
        has_nan: some gradient holds a NaN.
        has_inf: some gradient holds an infinity.
        max_norm: the largest norm of one parameter's gradient; NaN if one is.
        min_norm: the smallest that is above zero; 0 if there is none.
        affected_layers: parameters with NaN or infinity, as ``"name (NaN)"``, ``"name (Inf)"`` or both.
        vanishing_layers: parameters whose norm is below the threshold, zero excepted.
        exploding_layers: parameters whose norm is above the threshold.
    """

    has_nan: bool
    has_inf: bool
    max_norm: float
    min_norm: float
    affected_layers: tuple[str, ...] = ()
    vanishing_layers: tuple[str, ...] = ()
    exploding_layers: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found."""
        return not (self.affected_layers or self.vanishing_layers or self.exploding_layers)

    def describe(self) -> str:
        """The findings in one sentence, for logs and errors."""
        findings = [
            f"{finding} in {_listed(layers)}"
            for finding, layers in (
                ("values that are not finite", self.affected_layers),
                ("exploding gradients", self.exploding_layers),
                ("vanishing gradients", self.vanishing_layers),
            )
            if layers
        ]
        return "; ".join(findings) or "no single layer stands out"


class GradientMonitor:
    """Judges every step by the one norm that is equal on all ranks, and counts failures in a row.

    A failure is a norm that is NaN, infinite or above ``explosion_threshold``: its step is skipped. Too many
    in a row end the training, since skipping does not help any more.
    """

    def __init__(
        self,
        max_consecutive_failures: int = 3,
        explosion_threshold: float | None = None,
        vanishing_threshold: float | None = None,
    ) -> None:
        """Set the limits.

        Args:
            max_consecutive_failures: that many in a row abort; 1 aborts at the first.
            explosion_threshold: largest norm of the whole mean gradient, before clipping, that is still used;
                in a scan, of one layer. None for no limit.
            vanishing_threshold: layers below it are named in a scan; None for never. No reason to skip.
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
        self.consecutive_failures = 0
        self.total_failures = 0

    def judge(self, norm: float, is_searching_scale: bool = False) -> Verdict:
        """Decide about a step and count it.

        Args:
            norm: of the whole gradient, equal on all ranks.
            is_searching_scale: fp16's loss scale may still be too large; then a norm that is not finite is a
                part of the search: skipped, but no failure.
        """
        limit = math.inf if self.explosion_threshold is None else self.explosion_threshold
        if math.isfinite(norm) and norm <= limit:
            self.consecutive_failures = 0
            return Verdict.STEP
        if is_searching_scale and not math.isfinite(norm):
            return Verdict.SKIP
        self.consecutive_failures += 1
        self.total_failures += 1
        if self.consecutive_failures >= self.max_consecutive_failures:
            return Verdict.ABORT
        return Verdict.SKIP

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
            f"the last with a gradient norm of {norm}.{where} "
            "The weights are those before them. Remediation steps:\n"
            "  - lower learning_rate, or lengthen the warm-up (warmup_ratio, warmup_steps)\n"
            "  - lower max_grad_norm to clip harder\n"
            "  - look for NaN or extreme values in the inputs and labels of these steps\n"
            "  - with precision fp16-mixed try bf16-mixed or fp32\n"
            "  - raise max_consecutive_bad_steps if such steps are expected"
        )

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
        """The counts of failures."""
        return {"consecutive_failures": self.consecutive_failures, "total_failures": self.total_failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.consecutive_failures = state_dict["consecutive_failures"]
        self.total_failures = state_dict["total_failures"]


def check_gradient_health(
    model: nn.Module, vanishing_threshold: float | None = None, explosion_threshold: float | None = None
) -> GradientHealth:
    """Look at the gradient of every parameter; those without one are left out.

    For diagnosis, not for every step: it waits for the device once, and once more for each layer with a norm
    that is not finite. Collective under FSDP.

    Args:
        model: after a backward pass, before the gradients are zeroed.
        vanishing_threshold: layers with a norm below it, but above zero, are listed.
        explosion_threshold: layers with a finite norm above it are listed.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    present = {name: _dense(gradient) for name, gradient in gradients.items() if gradient is not None}
    norms = dict(zip(present, _norms(list(present.values())), strict=True))
    infinite = [name for name, norm in norms.items() if not math.isfinite(norm)]
    broken = {name: _describe_values(present[name]) for name in infinite}
    lowest, highest = vanishing_threshold or 0.0, explosion_threshold or math.inf
    positive = [norm for norm in norms.values() if norm > 0]
    return GradientHealth(
        has_nan=any("NaN" in found for found in broken.values()),
        has_inf=any("Inf" in found for found in broken.values()),
        max_norm=_maximum(list(norms.values())),
        min_norm=min(positive, default=0.0),
        affected_layers=tuple(f"{name} ({found})" for name, found in broken.items()),
        vanishing_layers=tuple(name for name, norm in norms.items() if 0 < norm < lowest),
        exploding_layers=tuple(name for name, norm in norms.items() if highest < norm < math.inf),
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norms(gradients: list[Tensor]) -> list[float]:
    """The L2 norm of each, in float64 so that large finite values do not overflow."""
    if not gradients:
        return []
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, gradient in enumerate(gradients):
        groups.setdefault((type(gradient), gradient.device, gradient.dtype), []).append(place)
    norms: dict[int, float] = {}
    for places in groups.values():
        group = torch._foreach_norm([gradients[place] for place in places], 2.0, dtype=torch.float64)
        norms.update(zip(places, whole(torch.stack(group)).tolist(), strict=True))
    return [norms[place] for place in range(len(gradients))]


def _describe_values(gradient: Tensor) -> str:
    has_nan = bool(whole(gradient.isnan().any()))
    has_inf = bool(whole(gradient.isinf().any()))
    return "NaN, Inf" if has_nan and has_inf else "NaN" if has_nan else "Inf"


def _maximum(norms: list[float]) -> float:
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    return max(norms, default=0.0)


def _listed(layers: tuple[str, ...]) -> str:
    shown = ", ".join(layers[:_LISTED_LAYERS])
    hidden = len(layers) - _LISTED_LAYERS
    return f"{shown} and {hidden} more" if hidden > 0 else shown
