"""An experiment whose ranks hang, each in its own way and once: files in ``model.marks`` tell what has happened."""

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig, distributed

SLEEP, REGEX, STOP, SKIP, BOTH = "sleep", "regex", "stop", "skip", "both"
RANKS = {SLEEP: (0,), REGEX: (1,), STOP: (0,), SKIP: (1,), BOTH: (0, 1)}
#: In the middle of epochs, and with nothing to be saved: no exchange follows.
STEPS = {SLEEP: 25, REGEX: 50, STOP: 85, SKIP: 130, BOTH: 147}
CLASSES = 3


def mark_of(marks: Path, kind: str, rank: int) -> Path:
    """The file that tells that a rank has hung."""
    return marks / f"{kind}-{rank}"


def mark_all(marks: Path) -> None:
    """As if everything had happened already."""
    for kind, ranks in RANKS.items():
        for rank in ranks:
            mark_of(marks, kind, rank).touch()


class Points(Dataset):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.features = torch.randn(size, 5, generator=generator)
        self.labels = torch.randint(0, CLASSES, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


class Hangs:
    """Hooks that also tell the model which step it is at."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks
        self.step = 0

    def on_step_end(self, record: Any) -> None:
        self.step = record.step
        if self.must(STOP):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)  # other threads are stopped first
        if self.must(SKIP):
            skip_next_exchange()

    def must(self, kind: str) -> bool:
        """Whether this rank is to hang now; it won't a second time."""
        mark = mark_of(self.marks, kind, distributed.rank())
        if self.step < STEPS[kind] or distributed.rank() not in RANKS[kind] or mark.exists():
            return False
        mark.touch()
        return True


def skip_next_exchange() -> None:
    gather_rows = distributed.gather_rows

    def skip(rows: torch.Tensor) -> torch.Tensor:
        distributed.gather_rows = gather_rows
        return torch.stack([rows] * distributed.world_size())

    distributed.gather_rows = skip


class Network(nn.Module):
    def __init__(self, hangs: Hangs) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.hangs = hangs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and self.hangs.must(SLEEP):
            time.sleep(1000)
        if self.training and (self.hangs.must(REGEX) or self.hangs.must(BOTH)):
            re.match(r"(a?){40}a{40}", "a" * 40)
        return self.layers(features)


class Build:
    """The functions of the experiment, which share the hooks."""

    def __init__(self) -> None:
        self._hangs: Hangs | None = None

    def model(self, config: SimpleNamespace) -> nn.Module:
        self._hangs = Hangs(Path(config.marks))
        return Network(self._hangs)

    def hooks(self) -> Hangs | None:
        return self._hangs


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(size=320), "val": Points(size=32)}


build = Build()
experiment = Experiment(
    build.model,
    build_datasets,
    TaskSpec("points", "tabular_classification", input_fields=["features"]),
    build_hooks=build.hooks,
)
