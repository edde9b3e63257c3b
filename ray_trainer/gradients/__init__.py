"""From the backward pass to the weights: accumulation over sums, one norm, the verdict, the update."""

from ray_trainer.gradients.accumulator import AccumulationStats, GradientAccumulator
from ray_trainer.gradients.monitor import GradientHealth, GradientMonitor, Verdict, check_gradient_health

__all__ = [
    "AccumulationStats",
    "GradientAccumulator",
    "GradientHealth",
    "GradientMonitor",
    "Verdict",
    "check_gradient_health",
]
