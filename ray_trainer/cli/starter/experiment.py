"""What is trained, and on what. Start here: replace the model and the data by your own.

ray-trainer config check run.yaml      # is everything all right? trains nothing
ray-trainer train run.yaml             # train, or continue
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig


class Spirals(Dataset[dict[str, torch.Tensor]]):
    """Two spirals, to be told apart. Any map-style dataset will do, or a Ray Dataset for what is large."""

    def __init__(self, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)  # the same data at each start, or a run could not go on exactly
        self.label = torch.arange(num_samples) % 2
        angle = 9 * torch.rand(num_samples, generator=generator).sqrt()
        noise = 0.03 * torch.randn(num_samples, 2, generator=generator)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        self.point = (angle / 9).unsqueeze(1) * direction * (1 - 2 * self.label).unsqueeze(1) + noise

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample; its fields are those that the task below names."""
        return {"point": self.point[index], "label": self.label[index]}


def build_model(config: SimpleNamespace) -> nn.Module:
    """Called on every worker, with what stands under `model:` in the run file."""
    return nn.Sequential(  # (B, 2) -> (B, 2)
        nn.Linear(2, config.width),
        nn.ReLU(),
        nn.Linear(config.width, config.width),
        nn.ReLU(),
        nn.Linear(config.width, 2),
    )


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Spirals]:
    """Called once, where the command is given. Validation data is optional."""
    return {"train": Spirals(2000, seed=0), "val": Spirals(400, seed=1)}


experiment = Experiment(
    build_model=build_model,
    build_datasets=build_datasets,
    # what a sample is; others are language_modeling, text_classification, vision_classification, regression ...
    task_spec=TaskSpec(
        name="spirals",
        task_type="tabular_classification",
        modality="tabular",
        input_fields=["point"],
        target_field="label",
    ),
    # optional: build_optimizer=lambda model, training: ..., build_hooks=lambda: ..., collate_fn=...
)
