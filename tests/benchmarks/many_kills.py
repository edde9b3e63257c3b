"""Whether anything grows while workers of one run are killed again and again.

Run it with ``python tests/benchmarks/many_kills.py [--kills 200] [--minutes 30]``. Two workers train a tiny network
with the hang monitor on. From outside, rank 1 gets SIGKILL in the first half of the kills and rank 0 in the second,
so that each of them survives half of the kills of the other. Each kill must have been answered by a replacement and
by new steps before the next one. Printed is what the run holds on to, over time, and how much of each it gained with
a kill once the first tenth was over. In the end the weights, the optimizer and the metrics are compared with those
of an undisturbed run of as many steps.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "chaos")]

import slow_points  # noqa: E402 - found through the path that is set above
from cluster_runs import (  # noqa: E402
    Command,
    command_line,
    descendants,
    kill,
    newest_checkpoint,
    step_of,
    tensors,
    training,
    whole_lines,
    write_run_file,
)
from experiments import assert_same, metric_rows  # noqa: E402

PATIENCE_S = 120
LOG_EVERY = 10  # steps
MEMORY = "MB"  # in the name of a column: shown with a fraction


def run_file(directory: Path, **settings: object) -> Path:
    """The run; without an end of its own unless it is given one."""
    return write_run_file(
        directory / "run.yaml",
        experiment=f"{slow_points.__file__}:experiment",
        training={
            "epochs": 10_000,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "log_every_n_steps": LOG_EVERY,
            "save_every_n_epochs": None,
            "save_every_n_steps": 100,
            "keep_last_n": 3,
            "keep_best_k": 0,
            "tensorboard": False,
            **settings,
        },
        cluster={"num_workers": 2, "name": "points", "storage_path": str(directory)},
    )


def sample(command: Command) -> dict[str, float]:
    """What the processes of the run hold on to now, and what lies about."""
    family = descendants(command.pid)
    roles = {pid: role_of(pid, command.pid) for pid in family}
    memory = Counter[str]()
    for pid, role in roles.items():
        memory[role] += rss_mb(pid)
    shared = {entry for pid in family for entry in shared_memory_of(pid)}
    survivor = max((pid for pid, role in roles.items() if role == "worker"), key=lambda pid: -started_at_s(pid))
    run_files = [path for path in command.run_dir.rglob("*") if path.exists()]
    return {
        "processes": len(family),
        "actors": sum(command_line(pid).startswith("ray::") for pid in family),
        "driver MB": rss_mb(command.pid),
        "driver fds": num_entries(command.pid, "fd"),
        "controller MB": memory["controller"],
        "controller fds": sum(num_entries(pid, "fd") for pid, role in roles.items() if role == "controller"),
        "survivor MB": rss_mb(survivor),
        "survivor fds": num_entries(survivor, "fd"),
        "survivor threads": num_entries(survivor, "task"),
        "raylet MB": memory["raylet"],
        "raylet fds": sum(num_entries(pid, "fd") for pid, role in roles.items() if role == "raylet"),
        "gcs MB": memory["gcs"],
        "rendezvous MB": memory["rendezvous"],
        "shared memory": len(shared),
        "/dev/shm left": len(left_in_shm(command)),
        "run directories": sum(path.is_dir() for path in run_files),
        "run files": sum(path.is_file() for path in run_files),
    }


def role_of(pid: int, driver: int) -> str:
    """What a process is to the run."""
    line = command_line(pid)
    marks = {
        "ray::RayTrainWorker": "worker",
        "ray::TrainController": "controller",
        "ray::Rendezvous": "rendezvous",
        "/raylet/raylet": "raylet",
        "gcs_server": "gcs",
    }
    if pid == driver:
        return "driver"
    return next((role for mark, role in marks.items() if mark in line.split("\0")[0]), "other")


def rss_mb(pid: int) -> float:
    """Resident memory that is not shared with other processes."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except OSError:
        return 0.0
    return (resident - shared) * os.sysconf("SC_PAGESIZE") / 1e6


def num_entries(pid: int, kind: str) -> int:
    """Open files, or threads, of a process."""
    try:
        return len(list(Path(f"/proc/{pid}/{kind}").iterdir()))
    except OSError:
        return 0


def started_at_s(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])


def shared_memory_of(pid: int) -> set[str]:
    """Files in memory that a process has mapped or open, by inode."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in maps if "/dev/shm/" in line or "/memfd:" in line}


def left_in_shm(command: Command) -> list[Path]:
    """Files under /dev/shm that name a process of this run, dead or alive."""
    pids = {str(pid) for pid, _ in command.seen}
    return [path for path in Path("/dev/shm").iterdir() if pids & set(path.name.replace("-", "_").split("_"))]


def wait_for(look: Callable[[], bool], what: str, command: Command) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}:\n{command.output[-5000:]}")
        time.sleep(0.1)


def newest_step(command: Command) -> int:
    rows = whole_lines(command.run_dir / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def kill_one(command: Command, rank: int) -> float:
    """Kill a rank and wait until it was replaced and training has gone on; the seconds that took."""
    before = len(rejoined(command))
    pid = command.worker_pid(rank)
    killed_s = time.monotonic()
    kill(pid)
    wait_for(lambda: len(rejoined(command)) > before, "the replacement", command)
    came_back_s = time.monotonic() - killed_s
    event = rejoined(command)[-1]
    assert event["replaced"] == [rank], event
    wait_for(lambda: newest_step(command) >= event["step"] + 10, "new steps", command)
    return came_back_s


def rejoined(command: Command) -> list[dict[str, object]]:
    return [row for row in whole_lines(command.run_dir / "events.jsonl") if row["event"] == "rejoined"]


def show(number: int, seconds: float, figures: dict[str, float]) -> None:
    cells = [f"{figures[name]:.1f}" if MEMORY in name else f"{figures[name]:.0f}" for name in figures]
    print(
        f"{number:5} {seconds:7.1f}  "
        + " ".join(cell.rjust(len(name)) for name, cell in zip(figures, cells, strict=True))
    )


def growth(samples: list[dict[str, float]], half: int) -> None:
    """Print how much of each a kill added; of the survivor in each half, because there it is another process."""
    settled = max(1, len(samples) // 10)
    for name in samples[0]:
        parts = [samples[settled:half], samples[half + settled :]] if "survivor" in name else [samples[settled:]]
        slopes = [
            float(np.polyfit(range(len(part)), [each[name] for each in part], 1)[0]) for part in parts if len(part) > 1
        ]
        print(f"{name:20}" + "  ".join(f"{slope:+.4f}" for slope in slopes) + " a kill")


def main() -> None:
    """Kill, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0, help="after which it is enough, whatever the number")
    parser.add_argument("--show-every", type=int, default=10, help="kills between two lines of the table")
    arguments = parser.parse_args()
    os.environ["SLOW_POINTS_PAUSE_S"] = "0.01"
    with tempfile.TemporaryDirectory() as place:
        with training(run_file(Path(place))) as command:
            command.wait_for_step(100)
            samples = [sample(command)]
            print(" kill seconds  " + " ".join(samples[0]))
            show(0, 0.0, samples[0])
            took = []
            until_s = time.monotonic() + arguments.minutes * 60
            for number in range(1, arguments.kills + 1):
                if time.monotonic() > until_s:
                    break
                took.append(kill_one(command, rank=1 if number <= arguments.kills // 2 else 0))
                samples.append(sample(command))
                if number % arguments.show_every == 0:
                    show(number, took[-1], samples[-1])
                    sys.stdout.flush()
            command.send(signal.SIGTERM)
            assert command.wait() == 143, command.output
            command.wait_until_nothing_is_left()
            print(f"/dev/shm after the end: {[path.name for path in left_in_shm(command)]}")
        print(f"\n{len(took)} kills, {np.median(took):.1f} s each until the replacement (longest {max(took):.1f} s)")
        growth(samples, half=arguments.kills // 2 + 1)
        last = step_of(newest_checkpoint(command.run_dir))
        os.environ["SLOW_POINTS_PAUSE_S"] = "0"
        whole = Path(place, "whole")
        whole.mkdir()
        with training(run_file(whole, max_steps=last)) as undisturbed:
            assert undisturbed.wait() == 0, undisturbed.output
        one, other = newest_checkpoint(undisturbed.run_dir), newest_checkpoint(command.run_dir)
        assert_same(tensors(one), tensors(other))
        rows = [row for row in metric_rows(undisturbed.run_dir) if row["step"] % LOG_EVERY == 0]
        assert_same(rows, metric_rows(command.run_dir))  # one that is stopped has no row of its last, short interval
        print(f"after {last} steps the same to the bit as an undisturbed run")


if __name__ == "__main__":
    main()
