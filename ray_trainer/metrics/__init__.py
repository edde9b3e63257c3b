"""What is measured: exact sums, the history, where rows and events go, what the terminal shows."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_trainer.metrics.events import EventLog, next_attempt, read_events, saved_checkpoints
    from ray_trainer.metrics.jsonl import JsonlLog, read_rows
    from ray_trainer.metrics.sums import MetricSums
    from ray_trainer.metrics.tensorboard import TensorBoardWriter
    from ray_trainer.metrics.terminal import LiveDisplay, ProgressRecord
    from ray_trainer.metrics.tracker import MetricsTracker
    from ray_trainer.metrics.writers import JsonlWriter, MetricsWriter, Writers

__all__ = [
    "EventLog",
    "JsonlLog",
    "JsonlWriter",
    "LiveDisplay",
    "MetricSums",
    "MetricsTracker",
    "MetricsWriter",
    "ProgressRecord",
    "TensorBoardWriter",
    "Writers",
    "next_attempt",
    "read_events",
    "read_rows",
    "saved_checkpoints",
]

_MODULES = {
    "events": ("EventLog", "next_attempt", "read_events", "saved_checkpoints"),
    "jsonl": ("JsonlLog", "read_rows"),
    "sums": ("MetricSums",),
    "tensorboard": ("TensorBoardWriter",),
    "terminal": ("LiveDisplay", "ProgressRecord"),
    "tracker": ("MetricsTracker",),
    "writers": ("JsonlWriter", "MetricsWriter", "Writers"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a part with its first use (PEP 562): whoever records an event needs no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
