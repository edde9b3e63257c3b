"""What ``determinism: elastic`` costs a step, beside the default.

Run it with ``python tests/benchmarks/elastic_cost.py [--millions 5] [--ranks 2]``. Processes that talk over gloo train
the same network with both, in turn, several times; printed is the ratio of the medians of seconds a step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import TaskSpec, Trainer, TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
WIDTH, BATCH, STEPS, WARM_UP = 512, 32, 60, 10
TASK = TaskSpec("points", "tabular_classification", input_fields=["features"])


class Clock:
    """Hooks that note when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, record: Any) -> None:
        self.ends.append(time.perf_counter())


def seconds_a_step(run_dir: Path, determinism: str, layers: int, micro_batches: int) -> float:
    """The median over the steps of one run."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    config = TrainingConfig(
        max_steps=STEPS,
        batch_size=BATCH,
        gradient_accumulation_steps=micro_batches,
        determinism=determinism,
        tensorboard=False,
        checkpoint_dir=str(run_dir),
    )
    data = TensorDataset(torch.randn(8192, WIDTH), torch.randint(0, WIDTH, (8192,)))
    clock = Clock()
    Trainer(model, SimpleNamespace(), config, TASK, clock).train(data)
    ends = clock.ends[WARM_UP:]
    return statistics.median(after - before for before, after in pairwise(ends))


def main() -> None:
    from ranks import on_ranks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=5.0, help="of parameters")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a rank in a step")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layers = max(1, round(arguments.millions * 1e6 / WIDTH**2))
    found: dict[str, list[float]] = {"world": [], "elastic": []}
    for _ in range(arguments.rounds):
        for determinism, seconds in found.items():
            with tempfile.TemporaryDirectory() as directory:
                run_dir = Path(directory, "run")
                options = (determinism, layers, arguments.micro_batches)
                seconds.append(max(on_ranks(arguments.ranks, seconds_a_step, run_dir, *options)))
    world, elastic = (statistics.median(seconds) for seconds in found.values())
    print(
        f"{arguments.ranks} ranks, {arguments.micro_batches} micro-batches each: elastic takes {elastic / world:.2f} x"
    )


if __name__ == "__main__":
    main()
