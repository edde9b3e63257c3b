"""An experiment in which that goes wrong which ``model.fault`` names."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray.data
import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig

SIZE, CLASSES = 40, 3


class Points(Dataset):
    """Random points in three classes, some of which may be wrong."""

    def __init__(self, size: int = SIZE, width: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(size, width, generator=generator)
        self.labels = torch.randint(0, CLASSES, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


def points_with(name: str, index: int, value: float) -> Points:
    points = Points()
    getattr(points, name)[index] = value
    return points


def as_ray_data(points: Points) -> ray.data.Dataset:
    rows = [{name: value.numpy() for name, value in points[i].items()} for i in range(len(points))]
    return ray.data.from_items(rows, override_num_blocks=4)


def fail(error: Exception) -> None:
    raise error


DATASETS: dict[str, Callable[[], dict[str, Any]]] = {
    "no samples": lambda: {"train": Points(size=0)},
    "no rows": lambda: {"train": ray.data.range(8).filter(lambda row: row["id"] > 8)},
    "first label": lambda: {"train": points_with("labels", 0, 7)},
    "late label": lambda: {"train": points_with("labels", SIZE - 1, 7)},
    "late label in Ray Data": lambda: {"train": as_ray_data(points_with("labels", SIZE - 1, 7))},
    "label of validation": lambda: {"train": Points(), "val": points_with("labels", 0, -3)},
    "wide features": lambda: {"train": Points(width=6)},
    "stuck valve": lambda: {"train": points_with("features", 20, 1000.0)},
    "crash": lambda: {"train": points_with("features", 20, 2000.0)},
    "hunger": lambda: {"train": points_with("features", 20, 3000.0)},
    "build_datasets": lambda: fail(FileNotFoundError("no points at /data/points.csv")),
    "no train": lambda: {"training": Points()},
}


@contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Inside, this process may take so much more and no more."""
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Valve(nn.Module):
    """Lets everything pass except a thousand, and takes the process with it at two thousand.

    Three thousand among more than two samples need more memory than the process may have.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if (features == 2000).any():
            os._exit(1)
        if (features == 1000).any():
            raise RuntimeError("the valve is stuck")
        if (features == 3000).any() and len(features) > 2:
            with limited_memory(256 << 20):
                torch.zeros(1 << 30, dtype=torch.uint8)
        return features


def build_model(config: SimpleNamespace) -> nn.Module:
    if config.fault == "build_model":
        raise KeyError("depth")
    return nn.Sequential(Valve(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return DATASETS[config.fault]() if config.fault in DATASETS else {"train": Points()}


experiment = Experiment(
    build_model, build_datasets, TaskSpec("points", "tabular_classification", input_fields=["features"])
)
