"""An experiment whose worker kills itself at a named point, once for each file that lies there for it.

``graves`` is a directory. A file in it, named ``POINT-rankN``, is a death that is still to come; who dies removes it.
As long as there is one named ``hold_after_step_N``, all wait there, and as long as there is one named ``slow``, each
step takes its time.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from handover import Handover, graves_of_run
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig

SIZE, CLASSES = 90, 3
DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
LAST_STEP = 18  # three epochs, fifteen samples a step


class Points(Dataset):
    """Random points in three classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(SIZE, 5, generator=generator)
        self.labels = torch.randint(0, CLASSES, (SIZE,), generator=generator)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


class Mortal(nn.Module):
    """Dies in a forward pass. It has statistics, which are those of rank 0 in a checkpoint, and a count of its own."""

    def __init__(self, graves: str) -> None:
        super().__init__()
        self.graves = graves
        self.passes = 0
        self.register_buffer("seen", torch.zeros(()))
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes += 1
            die(self.graves, f"in_forward_{self.passes}")
            self.seen += features.mean()
        return self.layers(features)


class Hooks:
    """Points on the way."""

    graves = ""  # those of the model that was built last ...
    process = 0  # ... which was in this process; this class travels with what it has

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, record: Any) -> None:
        self.steps.append(record.step)
        die(self.graves, f"after_step_{record.step}")
        while Path(self.graves, f"hold_after_step_{record.step}").exists():
            time.sleep(0.02)
        if Path(self.graves, "slow").exists():
            time.sleep(0.2)

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        die(self.graves, "after_validation")

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        die(self.graves, f"at_the_end_of_epoch_{epoch}")

    def on_training_end(self) -> None:
        if self.steps and self.steps[-1] == LAST_STEP:
            die(self.graves, "at_the_end")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        die(self.graves, "in_restore")
        self.steps = list(state["steps"])


def die(graves: str, point: str) -> None:
    """As by ``kill -9``, as of a bad pointer or as by ``abort``, depending on the rank, if that is to happen here."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    with suppress(FileNotFoundError):
        Path(graves, f"{point}-rank{rank}").unlink()
        signal.pthread_kill(threading.get_ident(), DEATHS[rank % len(DEATHS)])  # this thread goes no further


def between_halves(is_source: bool) -> None:
    """Half of a survivor's state has been handed to a newcomer."""
    if is_source:
        die(str(graves_of_run()), "handing_over")
    elif Hooks.process != os.getpid():  # no model was ever built here
        die(str(graves_of_run()), "taking_over")


def build_model(config: SimpleNamespace) -> nn.Module:
    Hooks.graves, Hooks.process = config.graves, os.getpid()
    return Mortal(config.graves)


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(), "val": Points()}


def experiment_of() -> Experiment:
    """The experiment; its hooks find their graves where its model does."""
    return Experiment(
        Handover(build_model, between_halves),
        build_datasets,
        TaskSpec("points", "tabular_classification", input_fields=["features"]),
        build_hooks=Hooks,
    )
