"""What is wrong with gradients, layer by layer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_trainer.gradients.norms import whole

_LISTED_LAYERS = 5


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
