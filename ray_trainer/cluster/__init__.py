"""Training on Ray clusters: the only part of the package that imports Ray."""

import importlib
from typing import TYPE_CHECKING, Any

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.cluster.space import choice, grid, loguniform, randint, uniform
from ray_trainer.cluster.sweep_config import SweepConfig

if TYPE_CHECKING:
    from ray_trainer.cluster.files import DataFiles
    from ray_trainer.cluster.launch import FitResult, fit
    from ray_trainer.cluster.packing import pack_documents
    from ray_trainer.cluster.tuning import SweepResult, sweep

__all__ = [
    "ClusterConfig",
    "DataFiles",
    "FitResult",
    "SweepConfig",
    "SweepResult",
    "choice",
    "fit",
    "grid",
    "loguniform",
    "pack_documents",
    "randint",
    "sweep",
    "uniform",
]

_MODULES = {
    "DataFiles": "files",
    "FitResult": "launch",
    "SweepResult": "tuning",
    "fit": "launch",
    "pack_documents": "packing",
    "sweep": "tuning",
}


def __getattr__(name: str) -> Any:
    """Import Ray with the first thing that needs it: checking a run file does not (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
