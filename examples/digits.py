"""Handwritten digits, read into Ray Data and learned by a small convolutional network on two workers.

Run it with ``ray-trainer train examples/digits.yaml``. The 1,797 images of 8 x 8 pixels come with scikit-learn.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import ray.data
from torch import nn

from ray_trainer import Experiment, TaskSpec, TrainingConfig


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(  # (B, 1, 8, 8) -> (B, 10)
        nn.Conv2d(1, config.width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(config.width, config.width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(config.width * 16, 10),
    )


def scale(batch: dict[str, Any]) -> dict[str, Any]:
    pixels = batch["image"] / 16  # 0..16 in the files
    return {"image": pixels.astype(np.float32)[:, None], "label": batch["label"]}


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, ray.data.Dataset]:
    from sklearn.datasets import load_digits  # only here: workers do not need it

    images, labels = load_digits(return_X_y=True)
    rows = [{"image": image.reshape(8, 8), "label": int(label)} for image, label in zip(images, labels, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows))
    parts = {"train": order[360:], "val": order[:360]}
    return {
        name: ray.data.from_items([rows[index] for index in part]).map_batches(scale) for name, part in parts.items()
    }


experiment = Experiment(
    build_model=build_model,
    build_datasets=build_datasets,
    task_spec=TaskSpec(
        name="digits",
        task_type="vision_classification",
        modality="vision",
        input_fields=["image"],
        target_field="label",
    ),
)
