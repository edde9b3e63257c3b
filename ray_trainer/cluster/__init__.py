"""Training on Ray clusters: the only part of the package that imports Ray."""

from typing import TYPE_CHECKING, Any

from ray_trainer.cluster.config import ClusterConfig

if TYPE_CHECKING:
    from ray_trainer.cluster.launch import FitResult, fit

__all__ = ["ClusterConfig", "FitResult", "fit"]


def __getattr__(name: str) -> Any:
    """Import Ray with the first thing that needs it: checking a run file does not (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ray_trainer.cluster import launch

    return getattr(launch, name)
