"""An experiment whose steps leave time to act: points in three classes, and a pause in each step."""

import os
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig

STEPS = 240


class Points(Dataset):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(size, 6, generator=generator)
        self.labels = torch.randint(0, 3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


class Pause(DefaultHooks):
    def on_batch_end(self, batch_idx: int, loss: float) -> None:
        time.sleep(float(os.environ.get("SLOW_POINTS_PAUSE_S", "0.02")))


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(2 * training.batch_size * STEPS)}


experiment = Experiment(
    build_model,
    build_datasets,
    TaskSpec("points", "tabular_classification", input_fields=["features"]),
    build_hooks=Pause,
)
