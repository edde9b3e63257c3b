"""A worker is killed in the middle of a run, and nobody can tell from the weights.

Run it with ``python examples/survive_faults.py``. It trains the same network twice on two workers of this machine: once
undisturbed, and once with a worker that dies by SIGKILL, which no program can notice or delay. Then it compares the
weights, bit for bit. Nothing in this file deals with the failure but the code that causes it.

To do the same to an experiment of your own, see the README: train it, kill what you like, compare the exports.
"""

import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig, load_weights
from ray_trainer.cluster import ClusterConfig, fit


def build_model(config: SimpleNamespace) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, TensorDataset]:
    from sklearn.datasets import load_digits  # only here: workers do not need it

    images, labels = load_digits(return_X_y=True)
    return {"train": TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))}


experiment = Experiment(
    build_model,
    build_datasets,
    TaskSpec("digits", "tabular_classification", input_fields=["pixels"]),
)
training = TrainingConfig(epochs=15, batch_size=16, learning_rate=1e-3, save_every_n_steps=50)


def kill_a_worker(run_dir: Path) -> None:
    """As soon as there is a first checkpoint: ``kill -9`` for one of the two."""
    while not any(run_dir.glob("checkpoint_*/manifest.json")):
        time.sleep(0.01)
    processes = psutil.Process().children(recursive=True)
    victim = next(each for each in processes if each.cmdline()[:1] == ["ray::RayTrainWorker"])
    victim.kill()
    print(f"killed process {victim.pid}")


def main(directory: str) -> bool:
    """Whether the weights of both runs are the same."""

    def cluster(name: str) -> ClusterConfig:
        return ClusterConfig(num_workers=2, name=name, storage_path=directory, max_failures=1)

    undisturbed = fit(experiment, training, cluster("undisturbed"))

    threading.Thread(target=kill_a_worker, args=[Path(directory, "killed")], daemon=True).start()
    killed = fit(experiment, training, cluster("killed"))

    for line in Path(killed.run_dir, "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] in ("failure", "resumed", "run_finished"):
            print(event["event"] + (f" at step {event['step']}" if "step" in event else ""))

    ours, theirs = (load_weights(run.run_dir, which="newest") for run in (undisturbed, killed))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        is_same = main(directory)
    print("the same weights, to the bit" if is_same else "the weights differ")
    raise SystemExit(not is_same)
