"""What being watched costs a training step, as a share of a step of 10 ms.

Run it with ``python tests/benchmarks/monitor_overhead.py``. Steps of the real `Trainer` on a tiny network are timed
in slices that are watched and not watched in turn; the median of the differences of neighbours, in CPU time, is the
cost of the signs of life, whatever else the machine does. Beside it: what the exchange of times by phase adds on
rank 0, and the share of a core that the watching process takes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ray_trainer import TaskSpec, Trainer, TrainingConfig, pulse
from ray_trainer.hang_report import pack
from ray_trainer.pulse import COMPARED
from ray_trainer.pulse.orders import Orders
from ray_trainer.pulse.watched import Watched
from ray_trainer.storage import Storage
from ray_trainer.stragglers import StragglerWatch

STEP_S = 0.010
SLICE = 50
WARM_UP_SLICES = 4


class Slices:
    """Hooks that watch every second slice of steps, and time all."""

    def __init__(self, watched: pulse.Pulse) -> None:
        self.seconds: list[tuple[bool, float]] = []
        self._watched = watched
        self._stack = ExitStack()
        self._is_watched = False
        self._since = time.thread_time()

    def on_step_end(self, record: Any) -> None:
        """Close a slice where one ends."""
        if record.step % SLICE:
            return
        self.seconds.append((self._is_watched, time.thread_time() - self._since))
        self._stack.close()
        self._is_watched = not self._is_watched
        if self._is_watched:
            self._stack.enter_context(pulse.begun(self._watched))
        self._since = time.thread_time()


def cost_of_beats_s(slices: int, directory: Path) -> float:
    """Of one step, in seconds."""
    size = 32 * SLICE  # so that each slice is one epoch
    data = torch.utils.data.TensorDataset(torch.randn(size, 64), torch.randint(0, 10, (size,)))
    config = TrainingConfig(
        epochs=10**6,
        max_steps=SLICE * slices,
        batch_size=32,
        tensorboard=False,
        log_every_n_steps=SLICE,
        save_every_n_epochs=None,
        checkpoint_dir=str(directory / "run"),
    )
    spec = TaskSpec("points", "tabular_classification", input_fields=["features"])
    hooks = Slices(pulse.Pulse.unwatched())
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    Trainer(model, SimpleNamespace(), config, spec, hooks).train(data)
    slices_s = hooks.seconds[WARM_UP_SLICES:]
    neighbours = zip(slices_s, slices_s[1:], slices_s[2:], strict=False)
    differences = [
        (own - (before + after) / 2) * (1 if is_watched else -1) / SLICE
        for (_, before), (is_watched, own), (_, after) in neighbours
    ]
    return statistics.median(differences)


def cost_of_times_s(repetitions: int = 20000) -> float:
    """What rank 0 of eight does with the times by phase of each step."""
    watch, rows = StragglerWatch(), torch.full((8, len(COMPARED)), 0.01, dtype=torch.float64)
    before = time.perf_counter()
    for _ in range(repetitions):
        watch.add(rows, STEP_S)
    return (time.perf_counter() - before) / repetitions


@contextmanager
def watched_process(directory: Path) -> Iterator[int]:
    """The process that watches this one."""
    watched = Watched()
    orders = Orders(0, 1, 10.0, 1800.0, [], None, "", pack(Storage.open(directory)))
    with watched.alive():
        yield watched.be_watched(orders)


def share_of_a_core(directory: Path, seconds: float) -> float:
    """CPU time of the watching process, after it has started, of the time that passed."""
    with watched_process(directory) as pid:
        time.sleep(2)
        before = cpu_s(pid)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pulse.beat(pulse.Phase.FORWARD)
            time.sleep(STEP_S)
        return (cpu_s(pid) - before) / seconds


def cpu_s(pid: int) -> float:
    """So far, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=400, help=f"of {SLICE} steps each")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which the watching process is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        beats_s = cost_of_beats_s(arguments.slices, Path(name))
        times_s = cost_of_times_s()
        core = share_of_a_core(Path(name), arguments.seconds)
    figures = {
        "beats_us_per_step": round(beats_s * 1e6, 2),
        "times_us_per_step_of_rank_0": round(times_s * 1e6, 2),
        "share_of_a_10_ms_step": round((beats_s + times_s) / STEP_S, 5),
        "share_of_a_core_beside": round(core, 5),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
