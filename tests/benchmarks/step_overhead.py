"""What a training step of the `Trainer` costs, as a ratio to hand-written loops that run beside it.

Run it with ``python tests/benchmarks/step_overhead.py``. One process, one thread, a network of 64-64-10, batches of
32, everything of a normal run switched on. The data source takes the time: at every 50th fetch it closes a slice of
the Trainer's steps, and right there lets each hand-written loop do as many. Each slice is divided by the mean of
those before and after it, so other load on the machine hits both; the median over the slices is printed.

The data is either ready-made batches, which leaves the cost of the step alone, or a shuffled `TensorDataset`, as
most scripts have it.
"""

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ray_trainer import TaskSpec, Trainer, TrainingConfig
from ray_trainer.data.order import Indices
from ray_trainer.data.readers import TensorReader

BATCH_SIZE = 32
SLICE = LOG_EVERY = 50
WARM_UP = 400
LEARNING_RATE = 1e-3
LR_WARM_UP = 100
MAX_NORM = 1.0

Pair = tuple[Tensor, Tensor]


class Cost(NamedTuple):
    """Of one step, in microseconds."""

    cpu: float
    wall: float


class Stopwatch:
    """Wall and CPU time of this thread since its making."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def per_step(self) -> Cost:
        """Of `SLICE` steps."""
        wall, cpu = time.perf_counter(), time.thread_time()
        return Cost((cpu - self._cpu) / SLICE * 1e6, (wall - self._wall) / SLICE * 1e6)


class ByHand:
    """A training loop as people write it, advanced some steps at a time."""

    def __init__(self, batches: Iterator[Pair], directory: Path, fused: bool) -> None:
        self.model = build_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=fused or None)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / (LR_WARM_UP + 1))
        )
        self.batches = batches
        self.step = 0
        directory.mkdir()
        self.file = (directory / "log.csv").open("w", newline="")
        self.directory = directory

    def run(self, steps: int) -> None:
        """Clip, schedule, and the loss to a CSV file now and then."""
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        writer = csv.writer(self.file)
        for _ in range(steps):
            x, y = next(self.batches)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            self.step += 1
            if self.step % LOG_EVERY == 0:
                writer.writerow([self.step, loss.item(), scheduler.get_last_lr()[0]])
                self.file.flush()


class WithAccuracy(ByHand):
    """The same, and the accuracy of training."""

    def run(self, steps: int) -> None:
        """As above, with hits and samples counted."""
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        writer = csv.writer(self.file)
        hits, samples = torch.zeros((), dtype=torch.int64), 0
        for _ in range(steps):
            x, y = next(self.batches)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            hits += (logits.argmax(1) == y).sum()
            samples += len(y)
            self.step += 1
            if self.step % LOG_EVERY == 0:
                writer.writerow([self.step, loss.item(), hits.item() / samples, scheduler.get_last_lr()[0]])
                self.file.flush()
                hits, samples = torch.zeros((), dtype=torch.int64), 0


class Everything(ByHand):
    """What the Trainer does: means over all samples, no update from a NaN, JSONL and TensorBoard."""

    def __init__(self, batches: Iterator[Pair], directory: Path, fused: bool) -> None:
        super().__init__(batches, directory, fused)
        self.tensorboard = SummaryWriter(str(directory))
        self.since = time.perf_counter()

    def run(self, steps: int) -> None:
        """As above."""
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        loss_sum, hits, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
        for _ in range(steps):
            x, y = next(self.batches)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item()
            if math.isfinite(norm):
                optimizer.step()
                scheduler.step()
                loss_sum += loss.detach() * len(y)
                hits += (logits.argmax(1) == y).sum()
                samples += len(y)
            optimizer.zero_grad()
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.log(norm, loss_sum.item() / samples, hits.item() / samples, samples)
                loss_sum, hits, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0

    def log(self, norm: float, loss: float, accuracy: float, samples: int) -> None:
        """A line of JSON and points for TensorBoard."""
        now = time.perf_counter()
        row = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "samples_per_s": samples / (now - self.since),
        }
        self.since = now
        self.file.write(json.dumps({"step": self.step, "time": time.time(), **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.tensorboard.add_scalar(f"train/{name}", value, self.step)


class SliceClock:
    """Told of each fetch, it closes the Trainer's slices and lets the hand-written loops run between them."""

    def __init__(self, model: nn.Module, loops: dict[str, ByHand]) -> None:
        self.weights_differ_by = math.nan
        self.ours: list[Cost] = []
        self.theirs: list[dict[str, Cost]] = []
        self._model = model
        self._loops = loops
        self._fetches = 0
        self._watch = Stopwatch()
        for loop in loops.values():
            loop.run(WARM_UP)

    def fetched(self) -> None:
        """The Trainer begins a step, or tries the first batch without gradients."""
        if not torch.is_grad_enabled():
            return
        done = self._fetches - WARM_UP
        self._fetches += 1
        if done < 0 or done % SLICE:
            return
        if self.theirs:
            self.ours.append(self._watch.per_step())
        else:
            self.weights_differ_by = distance(self._model, self._loops["the same work"].model)
        self.theirs.append({name: timed(loop) for name, loop in self._loops.items()})
        self._watch = Stopwatch()

    def beside(self, name: str) -> list[Cost]:
        """What a hand-written loop cost around each of the Trainer's slices."""
        costs = [row[name] for row in self.theirs]
        return [Cost((a.cpu + b.cpu) / 2, (a.wall + b.wall) / 2) for a, b in pairwise(costs)]


def distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((one - two).detach().abs().max()) for one, two in pairs)


def timed(loop: ByHand) -> Cost:
    watch = Stopwatch()
    loop.run(SLICE)
    return watch.per_step()


class ReadyBatches(Dataset[Pair]):
    """64 batches, over and over."""

    def __init__(self, data: TensorDataset, length: int, on_fetch: Callable[[], None] = lambda: None) -> None:
        starts = range(0, 64 * BATCH_SIZE, BATCH_SIZE)
        self._batches = [tuple(part[at : at + BATCH_SIZE].clone() for part in data.tensors) for at in starts]
        self._length = length
        self._on_fetch = on_fetch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        self._on_fetch()
        return self._batches[index % 64]

    def fingerprint(self) -> str:
        """Without one of its own, samples would be fetched for it."""
        return "ready"


class TimedTensors:
    """A `TensorDataset` as the Trainer reads it, that tells of each fetch."""

    reads_in_processes = False

    def __init__(self, data: TensorDataset, on_fetch: Callable[[], None]) -> None:
        self._reader = TensorReader(data.tensors)
        self._on_fetch = on_fetch

    def __len__(self) -> int:
        return len(self._reader)

    def fetch(self, indices: Indices, epoch: int = 0) -> Any:
        """See `IndexedDataset`."""
        self._on_fetch()
        return self._reader.fetch(indices, epoch)

    def fingerprint(self) -> str:
        """See `IndexedDataset`."""
        return self._reader.fingerprint()


def build_model() -> nn.Module:
    torch.manual_seed(1234)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_data(num_samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1234)
    x = torch.randn(num_samples, 64, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (num_samples,), generator=generator))


def forever(batches: Callable[[], Any]) -> Iterator[Pair]:
    while True:
        yield from batches()


def rows_at_once(data: TensorDataset) -> Iterator[Any]:
    """The shuffled rows, a batch at a time: what a default `DataLoader` does one by one."""
    for rows in torch.randperm(len(data)).split(BATCH_SIZE):
        yield tuple(part[rows] for part in data.tensors)


def hand_written(data: TensorDataset, ready: bool, directory: Path) -> dict[str, ByHand]:
    def usual() -> Iterator[Pair]:
        if ready:
            return forever(lambda: DataLoader(ReadyBatches(data, 1 << 30), batch_size=None))
        return forever(lambda: DataLoader(data, batch_size=BATCH_SIZE, shuffle=True))

    best = usual() if ready else forever(lambda: rows_at_once(data))
    return {
        "usual": ByHand(usual(), directory / "usual", fused=False),
        "usual, accuracy": WithAccuracy(usual(), directory / "accuracy", fused=False),
        "fused": ByHand(usual(), directory / "fused", fused=True),
        "fused, accuracy": WithAccuracy(usual(), directory / "fused_accuracy", fused=True),
        "the same work": Everything(best, directory / "everything", fused=True),
    }


def measure(ready: bool, slices: int, directory: Path) -> dict[str, Any]:
    steps = WARM_UP + slices * SLICE
    data = make_data(steps * BATCH_SIZE)
    loops = hand_written(data, ready, directory)
    model = build_model()
    clock = SliceClock(model, loops)
    config = TrainingConfig(
        epochs=1,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=LR_WARM_UP,
        max_grad_norm=MAX_NORM,
        log_every_n_steps=LOG_EVERY,
        checkpoint_dir=str(directory / "run"),
    )
    trainer = Trainer(model, None, config, TaskSpec("step", "tabular_classification"))
    if ready:
        trainer.train(DataLoader(ReadyBatches(data, steps, clock.fetched), batch_size=None))
    else:
        trainer.train(TimedTensors(data, clock.fetched))
    return {
        "trainer_us": statistics.median(ours.cpu for ours in clock.ours),
        "slices": len(clock.ours),
        "weights_differ_by": clock.weights_differ_by if ready else None,  # the other order is another training
        "loops": {name: summary(clock.ours, clock.beside(name)) for name in loops},
    }


def summary(ours: list[Cost], theirs: list[Cost]) -> dict[str, float]:
    cpu = [one.cpu / other.cpu for one, other in zip(ours, theirs, strict=True)]
    low, ratio, high = statistics.quantiles(cpu, n=4)
    return {
        "us": statistics.median(cost.cpu for cost in theirs),
        "ratio": ratio,
        "low": low,
        "high": high,
        "wall": statistics.median(one.wall / other.wall for one, other in zip(ours, theirs, strict=True)),
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}: {result['trainer_us']:.0f} us a step of the Trainer, {result['slices']} slices of {SLICE} steps")
    if result["weights_differ_by"] is not None:
        print(f"after {WARM_UP} steps the weights differ by {result['weights_differ_by']:.1g} from 'the same work'")
    print(f"{'hand-written loop':20s} {'us a step':>9s} {'ratio':>6s} {'quartiles':>13s} {'wall':>6s}")
    for name, row in result["loops"].items():
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        print(f"{name:20s} {row['us']:9.0f} {row['ratio']:6.2f} {quartiles:>13s} {row['wall']:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a training step against hand-written loops.")
    parser.add_argument("--slices", type=int, default=100, help="of 50 steps, for each kind of data")
    slices = parser.parse_args().slices
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for kind, title in (("ready", "Ready-made batches"), ("tensors", "Shuffled TensorDataset")):
            (Path(directory) / kind).mkdir()
            results[kind] = measure(kind == "ready", slices, Path(directory) / kind)
            show(title, results[kind])
    print(json.dumps({"torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
