"""Hooks: code of your own at fixed moments of a training.

Any object with some of these methods will do, and nothing has to be inherited. This one stops as soon as validation is
as good as it has to be, asks for a checkpoint at each new record, and counts on when the run is continued, because
what `state_dict` returns is a part of each checkpoint. It trains on the handwritten digits of scikit-learn.
Run it with ``ray-trainer train examples/custom_hooks.yaml``.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, Request, TaskSpec, TrainingConfig

GOOD_ENOUGH = 0.95


class Coach:
    """One of them lives in each worker. What it returns is agreed on, so all workers do the same."""

    def __init__(self) -> None:
        self.record = 0.0
        self.samples_seen = 0

    # ---- what it watches

    def on_step_end(self, record: Any) -> None:
        """After each step. `record.loss` and `record.gradient_norm` are there as well."""
        self.samples_seen += record.num_samples

    def on_validation_end(self, metrics: dict[str, float]) -> Request | None:
        """May answer with a request: to save, to stop, or both."""
        accuracy = metrics["val_accuracy"]
        if accuracy <= self.record:
            return None
        self.record = accuracy
        say(f"record: {accuracy:.3f} after {self.samples_seen} samples")
        return Request.SAVE | Request.STOP if accuracy >= GOOD_ENOUGH else Request.SAVE

    def on_checkpoint_saved(self, record: Any) -> None:
        """Once a checkpoint is safe; `record` also tells how long training stood still for it."""
        say(f"saved step {record.step}, {record.size_bytes} bytes")

    def on_resume(self, record: Any) -> None:
        """Only if the run goes on from a checkpoint; its state was loaded before."""
        say(f"going on from step {record.step}; the record is {self.record:.3f}")

    def on_training_end(self) -> None:
        """Always, also after an error."""
        say(f"the end, after {self.samples_seen} samples")

    # ---- what a checkpoint keeps of it

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"record": self.record, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What an earlier process returned above."""
        self.record, self.samples_seen = state["record"], state["samples_seen"]


def say(text: str) -> None:
    """Print it once, not on each worker."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text)


# ---- a small task to watch


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(nn.Linear(64, config.width), nn.ReLU(), nn.Linear(config.width, 10))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, TensorDataset]:
    from sklearn.datasets import load_digits  # only here: workers do not need it

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return {"train": TensorDataset(inputs[360:], targets[360:]), "val": TensorDataset(inputs[:360], targets[:360])}


experiment = Experiment(
    build_model=build_model,
    build_datasets=build_datasets,
    build_hooks=Coach,
    task_spec=TaskSpec(name="digits", task_type="tabular_classification", input_fields=["pixels"]),
)
