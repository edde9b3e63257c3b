"""A run that was begun on two workers is continued on one, and ends with the same weights, bit for bit.

Run it with ``python examples/fewer_workers.py``. It compares a run that stays on two workers with one that loses the
second of them half way. ``determinism: elastic`` makes the number of workers a matter of time alone: the global batch
is cut into micro-batches that are the same whoever computes them, dropout included, and their gradients are added up
in one order.

With ``--determinism world``, the default elsewhere, steps take the same samples as well, and the learning rate takes
the same course. But two workers add up their gradients in another order than one does, and draw other numbers for
dropout, so the weights differ.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig, load_weights
from ray_trainer.cluster import ClusterConfig, fit


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 10))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, TensorDataset]:
    from sklearn.datasets import load_digits  # only here: workers do not need it

    images, labels = load_digits(return_X_y=True)
    return {"train": TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))}


experiment = Experiment(
    build_model,
    build_datasets,
    TaskSpec("digits", "tabular_classification", input_fields=["pixels"]),
)
training = TrainingConfig(
    epochs=4,  # of 57 steps: 1,797 images, 32 a step
    batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_type="constant",  # others depend on the number of steps, which `max_steps` below would change
    warmup_steps=0,
    log_every_n_steps=1,
)


def steps_of(run_dir: str) -> list[dict[str, float]]:
    """What the run wrote down of each of its steps."""
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def main(directory: str, determinism: str = "elastic") -> dict[str, float]:
    """What came of it: 0 where the runs are equal, else the greatest difference."""
    config = replace(training, determinism=determinism)

    def cluster(name: str, num_workers: int) -> ClusterConfig:
        return ClusterConfig(num_workers=num_workers, name=name, storage_path=directory)

    whole = fit(experiment, config, cluster("two workers", 2))

    fit(experiment, replace(config, max_steps=100), cluster("then one", 2))  # stops in the second epoch
    shrunk = fit(experiment, config, cluster("then one", 1))  # the same name continues the run

    ours, theirs = steps_of(whole.run_dir), steps_of(shrunk.run_dir)
    differences = {
        name: max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))
        for name in ("step", "epoch", "learning_rate", "loss")
    }
    one, other = (load_weights(run.run_dir, which="newest") for run in (whole, shrunk))
    differences["weights"] = max((one[name] - other[name]).abs().max().item() for name in one)
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--determinism", choices=["elastic", "world"], default="elastic")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name, difference in main(directory, arguments.determinism).items():
            print(f"{name:>13}: {f'differs by at most {difference:.1e}' if difference else 'the same'}")
