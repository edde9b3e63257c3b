"""An experiment in which a process dies at a named point, once for each grave that lies there for it.

A grave is a file ``POINT-rankN`` in a directory. When the worker of that rank gets to that point it takes the grave
away, writes down what it does, and kills whom the grave's content names: itself, all workers, its node, Ray's
controller of the run, or the driver. That file says what happened, and for each completed step of each rank another
one says which samples it was made of.
"""

import json
import os
import signal
import sys
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
from ray_trainer.chaos.processes import command_line, descendants

SIZE, CLASSES = 180, 3
STEPS_AN_EPOCH = 6  # two micro-batches of five samples on each of three workers
PAUSE_S = 0.1  # in each of them, while somebody wants time to dig
WIDE = 1100  # so that a checkpoint is large enough for the process that writes beside the training


class Graves:
    """The graves of this process, and what it knows of the run."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.step = 0
        self.samples: list[int] = []

    def at(self, point: str) -> None:
        """Do what is to happen at this point, if this rank has a grave there."""
        if not self.is_dug(point) or is_orphan():
            return
        grave = self.place / f"{point}-rank{rank()}"
        victim = grave.read_text()
        grave.unlink()
        self.kill(point, victim)

    def is_dug(self, point: str) -> bool:
        return (self.place / f"{point}-rank{rank()}").exists()

    def kill(self, point: str, victim: str) -> None:
        """SIGKILL, from whichever thread."""
        pids = victims(victim)
        fired = {"point": point, "victim": victim, "rank": rank(), "step": self.step, "pids": pids}
        with (self.place / "fired.jsonl").open("a") as file:
            file.write(json.dumps({**fired, "time": time.time()}) + "\n")
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


GRAVES = Graves(Path())  # where the model was built last


def victims(victim: str) -> list[int]:
    """The processes that a grave means."""
    raylet = os.getppid()
    siblings = [pid for pid in descendants(raylet) if pid != raylet]
    driver = int(stat(raylet)[1])
    chosen: list[int]
    match victim:
        case "self":
            return [os.getpid()]
        case "all":
            chosen = [pid for pid in siblings if command_line(pid).startswith("ray::RayTrainWorker")]
        case "controller":
            chosen = [pid for pid in siblings if command_line(pid).startswith("ray::TrainController")]
        case "driver":
            chosen = [driver] if "ray_trainer" in command_line(driver) else []
        case "node":
            chosen = [raylet, *siblings] if "raylet" in command_line(raylet) else []
        case _:
            raise AssertionError(victim)
    assert chosen, f"no {victim} to be seen"
    return chosen


def is_orphan() -> bool:
    """Whether the driver is dead, so that this worker is not of the run any more."""
    return "python" not in command_line(int(stat(os.getppid())[1])).split("\0")[0]


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Points(Dataset):
    """Random points in three classes."""

    def __init__(self, graves: str, is_training: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(SIZE, 5, generator=generator)
        self.labels = torch.randint(0, CLASSES, (SIZE,), generator=generator)
        self.is_training = is_training
        self.graves = Graves(Path(graves))  # data travels apart from the rest, so it has its own

    def __len__(self) -> int:
        return SIZE if self.is_training else SIZE // 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.is_training:
            self.graves.at("fetch")
        return {"id": torch.tensor(index), "features": self.features[index], "labels": self.labels[index]}


class Mortal(nn.Module):
    """Has dropout, and statistics, and a layer that is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.wide = nn.Linear(8, WIDE)
        self.deep = nn.Linear(WIDE, WIDE)
        self.last = nn.Linear(WIDE, CLASSES)
        self.passes = 0

    def forward(self, id: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if not self.training:
            GRAVES.at("validation")
            return self.layers(features)
        if is_called_from("_settle_buckets"):
            return self.layers(features)  # thrown away
        GRAVES.samples += id.tolist()
        GRAVES.at("forward" if self.passes % 2 == 0 else "accumulation")
        self.passes += 1
        if (GRAVES.place / "slow").exists():
            time.sleep(PAUSE_S)
        output = self.layers(features)
        output.register_hook(lambda gradient: GRAVES.at("backward"))
        return output

    def layers(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.deep(torch.tanh(self.wide(self.first(features))))))


class Hooks:
    """Points on the way, and the samples of each step."""

    def __init__(self, model: Mortal, run_dir: Path) -> None:
        self.model = model
        self.run_dir = run_dir
        self.steps: list[int] = []

    def on_training_start(self) -> None:
        self.begin_step()

    def on_resume(self, record: Any) -> None:
        GRAVES.step = record.step
        self.begin_step()

    def begin_step(self) -> None:
        GRAVES.samples = []
        self.model.passes = 0

    def on_epoch_start(self, epoch: int) -> None:
        GRAVES.at("epoch_start")

    def on_step_end(self, record: Any) -> None:
        line = [record.step, rank(), dist.get_world_size() if dist.is_initialized() else 1, GRAVES.samples]
        with (GRAVES.place / f"samples-rank{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        GRAVES.step = record.step
        self.begin_step()
        self.steps = [*self.steps[-5:], record.step]
        if GRAVES.is_dug("retention"):
            die_while_a_checkpoint_is_deleted(self.run_dir)
        if GRAVES.is_dug("writer") and (writers := writers_at_work()):
            GRAVES.at("writer")
            for pid in writers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def on_checkpoint_saved(self, record: Any) -> None:
        GRAVES.at("saved")

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        GRAVES.at("epoch_end")

    def state_dict(self) -> dict[str, Any]:
        if is_called_from("keep"):
            GRAVES.at("keep")
        else:
            GRAVES.at("snapshot")
            if GRAVES.is_dug("writer"):
                hold_writer()
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        GRAVES.at("restore")
        self.steps = list(state["steps"])


def is_called_from(name: str) -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == name and "ray_trainer" in frame.f_code.co_filename:
            return True
    return False


def own_writers() -> list[int]:
    return [pid for pid in descendants(os.getpid()) if "ray_trainer.storage.beside" in command_line(pid)]


def hold_writer() -> None:
    """Let the process that writes checkpoints stand still: it gets its job, and does not come to it."""
    for pid in own_writers():
        os.kill(pid, signal.SIGSTOP)


def writers_at_work() -> list[int]:
    return [pid for pid in own_writers() if stat(pid)[0] == "T"]


def die_while_a_checkpoint_is_deleted(run_dir: Path) -> None:
    """In a thread, from now on, once: deleting the oldest one is made to take a while."""
    names = sorted((path for path in run_dir.glob("checkpoint_epoch*")), key=lambda path: path.name.split("_step")[-1])
    whole = [path for path in names if (path / "manifest.json").exists()]
    if len(whole) < 2 or (whole[0] / "filler").exists():
        return
    filler = whole[0] / "filler"
    filler.mkdir()
    for number in range(3000):
        (filler / str(number)).touch()
    manifest = whole[0] / "manifest.json"

    def watch() -> None:
        while manifest.exists():
            time.sleep(0.0002)
        if whole[0].exists():
            GRAVES.at("retention")

    threading.Thread(target=watch, daemon=True).start()


class Intercepted(nn.parallel.DistributedDataParallel):
    """Tells when an all-reduce of gradients is on its way."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, reduce_and_tell)


def reduce_and_tell(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True)
    GRAVES.at("all_reduce")
    return work.get_future().then(lambda future: future.value()[0])


def build_model(config: SimpleNamespace) -> nn.Module:
    GRAVES.place = Path(config.graves)
    nn.parallel.DistributedDataParallel = Intercepted  # type: ignore[misc] - the trainer wraps the model in it
    GRAVES.at("rejoin")
    model = Mortal()
    Built.hooks = Hooks(model, Path(config.run_dir))
    return model


def between_halves(is_source: bool) -> None:
    """Half of a survivor's state has been handed to a newcomer."""
    GRAVES.place = graves_of_run()  # no model was built in a newcomer yet
    GRAVES.at("handover")


class Built:
    """Hooks need what only the model is told."""

    hooks: Hooks


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate)
    optimizer.register_step_pre_hook(lambda *_: GRAVES.at("before_update"))
    optimizer.register_step_post_hook(lambda *_: GRAVES.at("after_update"))
    return optimizer


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points(config.graves, True), "val": Points(config.graves, False)}


experiment = Experiment(
    Handover(build_model, between_halves),
    build_datasets,
    TaskSpec("points", "tabular_classification", input_fields=["id", "features"]),
    build_optimizer=build_optimizer,
    build_hooks=lambda: Built.hooks,
)
