"""Training on Ray clusters: the only part of the package that imports Ray."""

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.launch import FitResult, fit

__all__ = ["ClusterConfig", "FitResult", "fit"]
