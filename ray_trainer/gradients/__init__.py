"""From the backward pass to the weights: accumulation over sums, one norm, the verdict, the update."""

from ray_trainer.gradients.accumulator import AccumulationStats, GradientAccumulator
from ray_trainer.gradients.health import GradientHealth, check_gradient_health
from ray_trainer.gradients.monitor import GradientMonitor, Policy, Verdict
from ray_trainer.gradients.points import RollbackPoints
from ray_trainer.gradients.spikes import SpikeDetector

__all__ = [
    "AccumulationStats",
    "GradientAccumulator",
    "GradientHealth",
    "GradientMonitor",
    "Policy",
    "RollbackPoints",
    "SpikeDetector",
    "Verdict",
    "check_gradient_health",
]
