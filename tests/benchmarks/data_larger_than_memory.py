"""Trains two workers for an epoch on a Ray Dataset that is larger than the object store.

Run it with ``python tests/benchmarks/data_larger_than_memory.py``; by default 5 GB are made on the spot and trained on
a Ray whose object store holds 1 GB. Needs twice the size of the data on disk, for what Ray spills. Prints how long
it takes and what was spilled, and fails if not every row was used exactly once.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import nn

from ray_trainer import DefaultHooks, Experiment, TaskSpec, TrainingConfig
from ray_trainer.cluster import ClusterConfig, fit

WIDTH = 1000  # 4 KB a row
MB = 1_000_000


class Counter(DefaultHooks):
    """Adds up the rows that this rank was trained on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows = self.sum_of_ids = self.sum_of_squares = 0

    def build_model(self, config: SimpleNamespace) -> nn.Module:
        """The network tells of what it sees."""
        return Network(self)

    def build_hooks(self) -> "Counter":
        """The object that the network tells."""
        return self

    def saw(self, ids: torch.Tensor) -> None:
        """Rows in a forward pass of training."""
        self.rows += len(ids)
        self.sum_of_ids += int(ids.sum())
        self.sum_of_squares += int((ids * ids).sum())

    def on_training_end(self) -> None:
        """Leave the sums where the driver finds them."""
        sums = [self.rows, self.sum_of_ids, self.sum_of_squares]
        (self.directory / f"counted{os.getpid()}.json").write_text(json.dumps(sums))


class Network(nn.Module):
    """One layer."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)
        self.counter = counter

    def forward(self, id: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(B,) and (B, WIDTH) -> (B, 2)."""
        if self.training and torch.is_grad_enabled():
            self.counter.saw(id)
        return self.layer(features)


def make_rows(num_rows: int) -> ray.data.Dataset:
    def widen(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = np.sin(batch["id"][:, None] * 0.001 + np.arange(WIDTH), dtype=np.float64).astype(np.float32)
        return {"id": batch["id"], "features": features, "labels": batch["id"] % 2}

    blocks = max(8, num_rows * WIDTH * 4 // (64 * MB))
    return ray.data.range(num_rows, override_num_blocks=blocks).map_batches(widen, batch_size=4096)


class SpillWatch:
    """Looks now and then at how much Ray has on disk."""

    def __init__(self, temp_dir: str) -> None:
        self.most_bytes = 0
        self._directory = Path(temp_dir)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more looking."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(1):
            total = 0
            for path in self._directory.glob("session_2*/ray_spilled_objects*/*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
            self.most_bytes = max(self.most_bytes, total)


def train(num_rows: int, directory: Path) -> dict[str, Any]:
    counter = Counter(directory)
    built_at: list[float] = []

    def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
        built_at.append(time.time())
        return {"train": make_rows(num_rows)}

    task = TaskSpec("rows", "tabular_classification", input_fields=["id", "features"], metrics=["loss"])
    experiment = Experiment(counter.build_model, build_datasets, task, build_hooks=counter.build_hooks)
    config = TrainingConfig(epochs=1, batch_size=256, log_every_n_steps=20, tensorboard=False)
    result = fit(experiment, config, ClusterConfig(num_workers=2, storage_path=str(directory), name="large"))
    events = [json.loads(line) for line in (directory / "large" / "events.jsonl").read_text().splitlines()]
    started = next(event["time"] for event in events if event["event"] == "workers_started")
    rows = [json.loads(line) for line in (directory / "large" / "metrics.jsonl").read_text().splitlines()]
    require_each_row_once(num_rows, directory)
    return {
        "seconds_to_first_step": started - built_at[0],
        "seconds_of_epoch": result.results["training_time"],
        "data_wait_s": float(np.mean([row["data_wait_s"] for row in rows if row["split"] == "train"])),
        "steps": rows[-1]["step"],
    }


def require_each_row_once(num_rows: int, directory: Path) -> None:
    counted = np.sum([json.loads(path.read_text()) for path in directory.glob("counted*.json")], axis=0).tolist()
    ids = range(num_rows)
    assert counted == [num_rows, sum(ids), sum(number * number for number in ids)], f"rows are missing: {counted}"


def main() -> None:
    parser = argparse.ArgumentParser(description="An epoch on data larger than the object store.")
    parser.add_argument("--size-mb", type=int, default=5000)
    parser.add_argument("--store-mb", type=int, default=1000)
    arguments = parser.parse_args()
    num_rows = arguments.size_mb * MB // (WIDTH * 4)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rt") as temp_dir:
        store_bytes = arguments.store_mb * MB
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=store_bytes,
            _temp_dir=temp_dir,
        )
        watch = SpillWatch(temp_dir)
        result = train(num_rows, Path(temp_dir))
        watch.stop()
        ray.shutdown()
    result |= {"rows": num_rows, "spilled_mb": watch.most_bytes / MB, **vars(arguments)}
    seconds, steps, wait = result["seconds_of_epoch"], result["steps"], result["data_wait_s"]
    print(f"{arguments.size_mb} MB in {num_rows} rows, object store {arguments.store_mb} MB: each row was used once")
    print(
        f"{result['seconds_to_first_step']:.0f} s until the workers start, up to {result['spilled_mb']:.0f} MB on disk"
    )
    print(f"{seconds:.0f} s of training, {arguments.size_mb / seconds:.0f} MB/s")
    print(f"{1e3 * seconds / steps:.1f} ms a step, {1e3 * wait:.1f} ms of them waiting for data")
    print(json.dumps({"ray": ray.__version__, **result}))


if __name__ == "__main__":
    main()
