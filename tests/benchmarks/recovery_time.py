"""How long a run stands still when a worker is killed: all start again, it is replaced, a spare takes over, or the
others train on without it.

Run it with ``python tests/benchmarks/recovery_time.py [--rank 0] [--rounds 3]``. Two workers train a network of 25
million parameters with AdamW and save every ten steps; one gets SIGKILL from outside. Printed are seconds from it on,
for the four ways in turn, on the same machine: until somebody noticed, until all workers were there again, until they
had the state, and until the first step that had not been done before; and how many steps were done twice.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ray_trainer import Experiment, TaskSpec, TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
WIDTH, BLOCKS, CLASSES = 512, 12, 10
KILL_AT_STEP, LAST_STEP = 25, 40
#: Settings of cluster and training.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all again": ({"in_job_recovery": False}, {}),
    "in place": ({}, {}),
    "a spare": ({"spare_workers": 1}, {}),
    "without it": ({}, {"determinism": "elastic"}),
}


class Points(Dataset):
    """Random points."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"features": torch.randn(WIDTH, generator=generator), "labels": torch.tensor(index % CLASSES)}


def build_model(config: SimpleNamespace) -> nn.Module:
    blocks = [(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(BLOCKS)]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(WIDTH, CLASSES))


def build_datasets(config: SimpleNamespace, training: TrainingConfig) -> dict[str, Any]:
    return {"train": Points()}


experiment = Experiment(
    build_model, build_datasets, TaskSpec("points", "tabular_classification", input_fields=["features"])
)


def measure(directory: Path, rank: int, way: str) -> dict[str, float]:
    """Seconds from the kill on, by phase, and the steps that were done twice."""
    from cluster_runs import kill, training, whole_lines, write_run_file  # imports Ray, which workers have

    of_cluster, of_training = WAYS[way]
    run_file = write_run_file(
        directory / "run.yaml",
        experiment=f"{Path(__file__).resolve()}:experiment",
        training={
            "max_steps": LAST_STEP,
            "batch_size": 16,
            "save_every_n_steps": 10,
            "log_every_n_steps": 1,
            "tensorboard": False,
            "keep_last_n": 2,
            **of_training,
        },
        cluster={
            "num_workers": 2,
            "resources_per_worker": {"CPU": 0.5},  # so that three find room on two cores; one thread each
            "name": "run",
            "storage_path": str(directory),
            **of_cluster,
        },
    )
    with training(run_file) as command:
        command.wait_for_step(KILL_AT_STEP)
        pid = command.worker_pid(rank)
        killed_at = time.time()
        kill(pid)
        done = whole_lines(command.run_dir / "metrics.jsonl")[-1]["step"]
        assert command.wait() == 0, command.output
    rows = {row["step"]: row["time"] for row in whole_lines(command.run_dir / "metrics.jsonl")}
    events: dict[str, dict[str, Any]] = {}
    for row in whole_lines(command.run_dir / "events.jsonl"):
        if row["time"] > killed_at:
            events.setdefault(row["event"], row)
    resumed, rejoined = events["resumed"], events.get("rejoined")
    assert ("rejoined" in events) == (way != "all again")
    if rejoined:
        assert rejoined["replaced"] == [rank] * (way != "without it")
        assert rejoined["by_spares"] == [rank] * (way == "a spare")
    told = rejoined or resumed
    return {
        "noticed": told["noticed_at"] - killed_at,
        "workers there": told["noticed_at"] + told["waited_s"] - killed_at,
        "state back": resumed["time"] - killed_at,
        "first new step": rows[done + 1] - killed_at,
        "steps done twice": float(done - resumed["step"]) if done > resumed["step"] else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, choices=[0, 1], default=1, help="which worker is killed")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as directory:
                found[way].append(measure(Path(directory), arguments.rank, way))
    medians = {
        way: {name: statistics.median(each[name] for each in runs) for name in runs[0]} for way, runs in found.items()
    }
    print(f"{'':18}" + "".join(f"{way:>12}" for way in WAYS))
    for name in medians["all again"]:
        print(f"{name:18}" + "".join(f"{medians[way][name]:12.2f}" for way in WAYS))
    took_s = {way: medians[way]["first new step"] for way in WAYS}
    print(f"{'of all again':18}" + "".join(f"{took_s[way] / took_s['all again']:12.2f}" for way in WAYS))


if __name__ == "__main__":
    main()
