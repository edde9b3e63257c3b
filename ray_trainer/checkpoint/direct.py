"""Saving and loading a model, an optimizer and a scheduler by themselves, in the shape of plain dicts."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from torch import nn

from ray_trainer.checkpoint.catalog import CheckpointRecord
from ray_trainer.checkpoint.encoding import encode_plain
from ray_trainer.checkpoint.restore import LoadedCheckpoint
from ray_trainer.state import Stateful

_OWN_KEYS = ("model", "optimizer", "scheduler")


@dataclass(frozen=True)
class CheckpointMetadata:
    """A checkpoint in the list of `CheckpointManager.list_checkpoints`.

    Attributes:
        best_metric: the monitored metric; None if it is missing or not finite.
        timestamp: of the save, ISO 8601 in UTC.
        metrics: JSON.
        path: what `CheckpointManager.load` takes.
    """

    epoch: int
    global_step: int
    best_metric: float | None
    timestamp: str
    metrics: str
    path: str

    @classmethod
    def of(cls, record: CheckpointRecord) -> "CheckpointMetadata":
        """The same checkpoint in this form."""
        return cls(
            epoch=record.epoch,
            global_step=record.step,
            best_metric=record.monitor_value,
            timestamp=_iso(record.time),
            metrics=json.dumps(encode_plain(record.metrics, ("metrics",))),
            path=record.uri,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)


def state_of(
    model: nn.Module,
    optimizer: Stateful | None,
    scheduler: Stateful | None,
    custom_state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The state to commit; weights under the model's own names, whatever it is wrapped in."""
    return {
        "model": _unwrapped(model).state_dict(),
        "optimizer": optimizer and optimizer.state_dict(),
        "scheduler": scheduler and scheduler.state_dict(),
        "custom_state": dict(custom_state or {}),
    }


def as_dict(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """A loaded checkpoint; parts that a trainer added stand in ``custom_state``."""
    state, manifest = loaded.state, loaded.manifest
    others = {name: part for name, part in state.items() if name not in _OWN_KEYS}
    return {
        "epoch": manifest.epoch,
        "global_step": manifest.step,
        "model_state_dict": state.get("model"),
        "optimizer_state_dict": state.get("optimizer"),
        "scheduler_state_dict": state.get("scheduler"),
        "metrics": manifest.metrics,
        "monitor": manifest.monitor,
        "monitor_value": manifest.monitor_value,
        "timestamp": _iso(manifest.time),
        "custom_state": others.get("custom_state", others),
    }


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and ``DistributedDataParallel``, which prefix its names."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    return model


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat()
