"""The digits of the quick start from memory, without Ray Data and scikit-learn, whose imports take most of a short run.

What Ray Data adds to a run that is killed is tested with `test_data_kills` and `test_cluster`.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(  # a step of it takes long enough for a test to do something meanwhile
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, TensorDataset]:
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    rows = torch.tensor(np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=","))
    images, labels = rows[:, :64].float().view(-1, 1, 8, 8) / 16, rows[:, 64].long()
    parts = {"train": slice(360, None), "val": slice(0, 360)}
    return {name: TensorDataset(images[part], labels[part]) for name, part in parts.items()}


experiment = Experiment(
    build_model,
    build_datasets,
    TaskSpec("digits", "vision_classification", input_fields=["image"], target_field="label"),
)
