"""How far will the disease have come in a year? A number, predicted from ten others.

The 442 patients come with scikit-learn: age, sex, body mass index, blood pressure and six blood values, and how far
their diabetes had come one year later. Run it with ``ray-trainer train examples/tabular_regression.yaml``.

A validation error (``val/mae``) of 0.57 is about what such data allows; always saying the mean gives 0.83.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, TensorDataset]:
    from sklearn.datasets import load_diabetes  # only here: workers do not need it

    features, progression = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(features))
    train, val = order[88:], order[:88]

    def scaled(table: np.ndarray) -> np.ndarray:
        """Mean 0 and deviation 1 over the patients that are trained on; the others must not be looked at."""
        return (table - table[train].mean(0)) / table[train].std(0)

    inputs = torch.tensor(scaled(features), dtype=torch.float32)
    targets = torch.tensor(scaled(progression), dtype=torch.float32)
    return {name: TensorDataset(inputs[part], targets[part]) for name, part in (("train", train), ("val", val))}


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(  # (B, 10) -> (B, 1)
        nn.Linear(10, config.width),
        nn.Tanh(),
        nn.Dropout(config.dropout),
        nn.Linear(config.width, 1),
    )


experiment = Experiment(
    build_model=build_model,
    build_datasets=build_datasets,
    task_spec=TaskSpec(
        name="diabetes",
        task_type="tabular_regression",
        loss_type="huber",  # as the squared error, but one odd patient does not pull so hard
        input_fields=["features"],  # a sample is a pair: first the features, then the target
        target_field="progression",
        metrics=["loss", "mae"],
    ),
)
