"""How fast rows of a Ray Dataset arrive in their exact order, beside the two usual ways of reading them.

Run it with ``python tests/benchmarks/data_throughput.py``. One process, one thread; 400,000 rows of 64 numbers and a
label lie in the object store of a local Ray, and the same rows as tensors in this process. Each round reads an epoch
by the ordered shard (fully shuffled, and shuffled in windows), by ``iter_torch_batches`` (not shuffled) and by a
shuffling ``DataLoader``, one after the other; ratios are taken within a round, and their median is printed.

Then: the first batch of a worker that starts at 1 % and at 90 % of an epoch, and what the `Trainer` logs as
``data_wait_s``.
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_trainer import TaskSpec, Trainer, TrainingConfig
from ray_trainer.cluster.shards import RayBlocks, index_ray_dataset
from ray_trainer.data.source import BatchPlan, build_source

WIDTH, CLASSES = 64, 10
WINDOW_PACK_BYTES = 16 * 2**20
OURS = ("ordered shard", "in windows")


def make_rows(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).standard_normal((num_rows, WIDTH), dtype=np.float32)
    return features, np.arange(num_rows) % CLASSES


def as_ray_dataset(features: np.ndarray, labels: np.ndarray) -> ray.data.Dataset:
    numbers = ray.data.from_numpy_refs([ray.put(part) for part in np.array_split(np.arange(len(labels)), 16)])
    everything = ray.put((features, labels))

    def look_up(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features, labels = ray.get(everything)
        return {"features": features[batch["data"]], "labels": labels[batch["data"]]}

    return numbers.map_batches(look_up)


def rows_per_s(num_rows: int, batches: Iterable[Any]) -> float:
    begin = time.perf_counter()
    seen = sum(len(batch["labels"]) if isinstance(batch, dict) else len(batch[1]) for batch in batches)
    seconds = time.perf_counter() - begin
    assert seen == num_rows
    return num_rows / seconds


def ordered(blocks: RayBlocks, batch_size: int, epoch: int) -> Iterable[Any]:
    """An epoch of a worker that has no pack open yet."""
    blocks = started_anew(blocks)
    for step in build_source(blocks, BatchPlan(batch_size, batch_size)).steps(epoch):
        yield from step.micro_batches


def started_anew(blocks: RayBlocks) -> RayBlocks:
    return pickle.loads(ray.cloudpickle.dumps(blocks))  # type: ignore[no-any-return]


def throughput(ways: dict[str, Callable[[int], Iterable[Any]]], num_rows: int, rounds: int) -> dict[str, Any]:
    """Rows a second of each way, and what ours are to the faster of the others."""
    results = [{name: rows_per_s(num_rows, read(epoch)) for name, read in ways.items()} for epoch in range(rounds + 1)]
    measured = results[1:]  # the first one warms everything up
    ratios = {
        name: [row[name] / max(row[other] for other in ways if other not in OURS) for row in measured] for name in OURS
    }
    return {
        "rows_per_s": {name: statistics.median(row[name] for row in measured) for name in ways},
        "ratio_to_the_faster": {name: statistics.median(values) for name, values in ratios.items()},
        "lowest_ratio": {name: min(values) for name, values in ratios.items()},
    }


def first_batch(blocks: RayBlocks, batch_size: int, epoch: int, share: float) -> tuple[float, int]:
    """Seconds and opened packs until a worker that has just been started holds its first batch."""
    fresh = started_anew(blocks)
    begin = time.perf_counter()
    source = build_source(fresh, BatchPlan(batch_size, batch_size))
    next(iter(source.steps(epoch, int(share * source.steps_per_epoch()))))
    return time.perf_counter() - begin, fresh.packs_loaded


def resume(blocks: RayBlocks, batch_size: int, rounds: int) -> dict[str, Any]:
    epochs = count(100)  # never one whose order is known already
    early, late = [], []
    for turn in range(2 * rounds):
        kind = early if turn % 2 else late
        kind.append(first_batch(blocks, batch_size, next(epochs), 0.01 if turn % 2 else 0.9))
    return {
        "ms_at_1_percent": statistics.median(seconds for seconds, _ in early) * 1e3,
        "ms_at_90_percent": statistics.median(seconds for seconds, _ in late) * 1e3,
        "ratio": statistics.median(b / a for (a, _), (b, _) in zip(early, late, strict=True)),
        "packs_opened": sorted({packs for _, packs in early + late}),
    }


def data_wait(blocks: RayBlocks, batch_size: int) -> dict[str, float]:
    """What the Trainer logs while it trains a small network."""
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    task = TaskSpec("rows", "tabular_classification", input_fields=["features"])
    with tempfile.TemporaryDirectory() as directory:
        config = TrainingConfig(
            epochs=1, batch_size=batch_size, checkpoint_dir=directory, log_every_n_steps=20, tensorboard=False
        )
        Trainer(model, None, config, task).train(blocks)
        rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    rows = rows[1:]  # set-up belongs to the first
    wait = statistics.median(row["data_wait_s"] for row in rows)
    return {
        "data_wait_us": wait * 1e6,
        "share_of_step": wait * statistics.median(r["samples_per_s"] for r in rows) / batch_size,
    }


def measure(num_rows: int, rounds: int) -> dict[str, Any]:
    features, labels = make_rows(num_rows)
    tensors = TensorDataset(torch.from_numpy(features), torch.from_numpy(labels))
    dataset = as_ray_dataset(features, labels)
    full = index_ray_dataset(dataset)
    windowed = index_ray_dataset(dataset, full_shuffle_bytes=0, window_pack_bytes=WINDOW_PACK_BYTES)
    stored = dataset.materialize()
    results: dict[str, Any] = {}
    for batch_size in (32, 1024):
        ways: dict[str, Callable[[int], Iterable[Any]]] = {
            "ordered shard": lambda epoch, size=batch_size: ordered(full, size, epoch),
            "in windows": lambda epoch, size=batch_size: ordered(windowed, size, epoch),
            "iter_torch_batches": lambda epoch, size=batch_size: stored.iter_torch_batches(batch_size=size),
            "DataLoader": lambda epoch, size=batch_size: DataLoader(tensors, batch_size=size, shuffle=True),
        }
        results[str(batch_size)] = {
            **throughput(ways, num_rows, rounds),
            "resume": {"ordered shard": resume(full, batch_size, 15), "in windows": resume(windowed, batch_size, 15)},
            **data_wait(full, batch_size),
        }
    return results


def show(batch_size: str, result: dict[str, Any]) -> None:
    print(f"\nBatches of {batch_size}")
    for name, rows in result["rows_per_s"].items():
        print(f"  {name:20s} {rows / 1e3:9.0f} k rows/s")
    for name in OURS:
        ratio, lowest = result["ratio_to_the_faster"][name], result["lowest_ratio"][name]
        print(f"  {name}: {ratio:.2f} times the faster of the other two (lowest round {lowest:.2f})")
        row = result["resume"][name]
        print(
            f"  {name}: first batch at 90 % {row['ms_at_90_percent']:.2f} ms, at 1 % {row['ms_at_1_percent']:.2f} ms, "
            f"ratio {row['ratio']:.2f}; packs opened {row['packs_opened']}"
        )
    print(f"  data_wait_s {result['data_wait_us']:.0f} us a step, {result['share_of_step']:.1%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows a second of the ordered shard.")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rt") as temp_dir:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temp_dir)
        ray.data.DataContext.get_current().enable_progress_bars = False
        results = measure(arguments.rows, arguments.rounds)
        ray.shutdown()
    for batch_size, result in results.items():
        show(batch_size, result)
    print(json.dumps({"ray": ray.__version__, "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
