"""What is measured: exact sums, the history, where rows and events go, what the terminal shows."""

from ray_trainer.metrics.events import EventLog, next_attempt, read_events
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
]
