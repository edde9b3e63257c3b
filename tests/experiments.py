"""Tiny tasks on which the trainer is tested, and what must be equal between two runs of one."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import TaskSpec, Trainer, TrainingConfig
from ray_trainer.runtime import Runtime

POINTS = TaskSpec("points", "tabular_classification", input_fields=["features"], metrics=["loss", "accuracy"])
FORKSERVER_IMPORTS = ["ray_trainer", "pandas", "pytest", "tensorboardX", "torch._dynamo"]  # what a child would wait for
TIMES = ("time", "samples_per_s", "data_wait_s")  # columns of metrics.jsonl that differ from run to run


class Points(Dataset):
    """Points in three classes; the first feature is the number of the sample, which the network does not use."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(size, 6, generator=generator)
        self.features[:, 0] = torch.arange(size)
        self.labels = torch.randint(0, 3, (size,), generator=generator)
        self.on_read: Callable[[int], None] = lambda index: None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.on_read(index)
        return {"features": self.features[index], "labels": self.labels[index]}


class Network(nn.Module):
    """Two layers with dropout; remembers the numbers of the samples that it was trained on."""

    def __init__(self, norm: bool = False, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        )
        self.seen: list[int] = []
        self.on_forward: Callable[[bool], None] = lambda training: None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.on_forward(self.training)
        if self.training:
            self.seen += features[:, 0].int().tolist()
        return self.layers(features[:, 1:])


class Diary:
    """Hooks that keep the samples of each step as their state, and may do something at any of their calls."""

    def __init__(self, model: Network) -> None:
        self.order: list[list[Any]] = []
        self.on_call: Callable[[str, int], None] = lambda name, count: None
        self._model = model
        self._calls: dict[str, int] = {}

    def act(self, name: str, count: int, action: Callable[[], None]) -> None:
        """Do something at the ``count``-th call of a hook; of `on_step_end`, after that step of the run."""
        self.on_call = lambda called, number: action() if (called, number) == (name, count) else None

    def on_training_start(self) -> None:
        self._model.seen = []

    def on_resume(self, record: Any) -> None:
        self._model.seen = []

    def on_epoch_start(self, epoch: int) -> None:
        self._called("on_epoch_start")

    def on_batch_end(self, batch_idx: int, loss: float) -> None:
        self._called("on_batch_end")

    def on_step_end(self, record: Any) -> None:
        self.order.append([record.epoch, record.step, self._model.seen])
        self._model.seen = []
        self._called("on_step_end", record.step)

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self._called("on_validation_end")

    def on_checkpoint_saved(self, record: Any) -> None:
        self._called("on_checkpoint_saved")

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        self._called("on_epoch_end")

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])

    def _called(self, name: str, count: int | None = None) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        self.on_call(name, count or self._calls[name])


@dataclass
class Outcome:
    """What a run left; all of it must be the same after an interruption."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    history: list[dict[str, float]]
    rows: list[dict[str, Any]]
    order: list[list[Any]]
    step: int
    best: tuple[int, float, str]
    results: dict[str, Any] = field(compare=False)


def settings(run_dir: Path, **changes: Any) -> TrainingConfig:
    """Everything that a resume could get wrong, switched on."""
    chosen: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "early_stopping_patience": 9,
        "log_every_n_steps": 2,
        "tensorboard": False,
        "keep_last_n": 50,
        "checkpoint_dir": str(run_dir),
    }
    return TrainingConfig(**(chosen | changes))


def prepare(
    run_dir: Path, norm: bool = False, size: int | None = None, runtime: Runtime | None = None, **changes: Any
) -> SimpleNamespace:
    """A trainer, its data and its diary; nothing has run yet."""
    torch.manual_seed(7)
    model = Network(norm)
    train_set = Points(size or (18 if norm else 19))  # with normalisation no micro-batch may be a single sample
    diary = Diary(model)
    trainer = Trainer(model, SimpleNamespace(), settings(run_dir, **changes), POINTS, diary, runtime=runtime)
    return SimpleNamespace(trainer=trainer, model=model, train_set=train_set, val_set=Points(7, seed=1), diary=diary)


def carry_out(prepared: SimpleNamespace, resume_from: str | None = "auto") -> Outcome:
    """Train, and gather what is left."""
    trainer = prepared.trainer
    results = trainer.train(prepared.train_set, prepared.val_set, resume_from)
    best = results["checkpoint_path"]
    return Outcome(
        weights={name: value.clone() for name, value in prepared.model.state_dict().items()},
        optimizer=trainer.optimizer.state_dict(),
        schedule=trainer.scheduler.state_dict(),
        history=results["metrics_summary"].drop(columns="epoch_duration").to_dict("records"),
        rows=metric_rows(trainer.training_config.checkpoint_dir),
        order=prepared.diary.order,
        step=trainer.progress.step,
        best=(
            results["best_epoch"],
            results["final_loss"],
            Path(best or "").name[: len("checkpoint_epoch0000_step00000000")],
        ),
        results=results,
    )


def run(run_dir: Path, resume_from: str | None = "auto", **changes: Any) -> Outcome:
    """One start of a run in a directory."""
    return carry_out(prepare(run_dir, **changes), resume_from)


def everything_in(directory: Path) -> set[Path]:
    """All files and directories of a run, relative to it, without those that say who is at work on it."""
    found = (path.relative_to(directory) for path in directory.rglob("*"))
    return {path for path in found if ".lease" not in path.parts}


def metric_rows(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step, without what time puts into them."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["step"], row["split"]))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def events(run_dir: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    rows = [json.loads(line) for line in (Path(run_dir) / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


def checkpoints(run_dir: Path) -> list[str]:
    """The names of the checkpoints, old to new."""
    return sorted((path.name for path in run_dir.glob("checkpoint_epoch*")), key=lambda name: name.split("_step")[-1])


def assert_same(one: Any, other: Any, where: str = "run") -> None:
    """To the bit: tensors, numbers, text, however nested."""
    if isinstance(one, Outcome):
        for name in ("weights", "optimizer", "schedule", "order", "step", "history", "best", "rows"):
            assert_same(getattr(one, name), getattr(other, name), name)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: {one} != {other}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: {sorted(map(str, one))} != {sorted(map(str, other))}"
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for place, (left, right) in enumerate(zip(one, other, strict=False)):
            assert_same(left, right, f"{where}[{place}]")
        assert len(one) == len(other), f"{where}: {len(one)} entries, not {len(other)}"
    else:
        assert one == other, f"{where}: {one!r} != {other!r}"


def assert_each_sample_once_an_epoch(outcome: Outcome, size: int) -> None:
    """Whatever happened on the way."""
    for epoch in {entry[0] for entry in outcome.order}:
        seen = [sample for at, _, samples in outcome.order if at == epoch for sample in samples]
        assert sorted(seen) == list(range(size)), f"epoch {epoch}: {seen}"
