"""What a checkpoint costs a training, beside the ways that PyTorch itself offers.

Run it with ``python tests/benchmarks/checkpoint_cost.py``. A stack of linear layers with AdamW is trained by a loop
that is the same for all; each way saves once in a round of steps, a round without a checkpoint comes in between, and
the order changes from round to round. Printed are medians: the *stall*, for which the call stopped the loop, as a
multiple of one warm memcpy of the same bytes made right before, by the clock and in CPU time (which does not count what
a shared machine takes away); and the *extra* time of the whole round, until the checkpoint is durable or the round
ends, whichever is later.

All four sync what they write: DCP's writer each file and its metadata (``sync_files``, its default), ``torch.save``
its one file here. Ours besides syncs the directory, computes the checksum of every file, writes the manifest and
deletes the checkpoint before, all within the round; what the others leave is deleted between rounds. DCP is called
with its defaults, so it allocates its copy anew each time; ours is allocated in a round that does not count.

``--memory`` measures instead how much memory one checkpoint of ours takes at most, all processes together, beyond
the training and its state.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta

SAVE_AT = 2


class Training:
    """A model whose parameters and AdamW state have ``millions`` x 12 MB."""

    def __init__(self, millions: float) -> None:
        torch.manual_seed(0)
        width = 768
        layers = max(1, round(millions * 1e6 / width**2))
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(32, width)
        self.step()

    def step(self) -> None:
        """One optimizer step."""
        loss = self.model(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Of model and optimizer, live."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint holds."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        return [*self.model.parameters(), *moments]


class Way:
    """A way to save; `begin` is the stall, `poll` comes after each step, `end` after the last."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self) -> Path:
        """A new place."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def begin(self, training: Training) -> None:
        """Save."""

    def poll(self) -> None:
        """Go on."""

    def end(self) -> None:
        """Wait until it is durable."""


class Ours(Way):
    """`CheckpointManager` as the Trainer uses it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.manager = CheckpointManager(directory, keep_last_n=1, keep_best_k=0)
        self.count = 0

    def begin(self, training: Training) -> None:
        """Copy the state."""
        self.count += 1
        self.commit = self.manager.begin(training.state(), {}, CheckpointMeta(epoch=0, step=self.count))

    def poll(self) -> None:
        """Seal it."""
        if self.commit.record is None and self.commit.is_done():
            self.manager.advance(self.commit)

    def end(self) -> None:
        """See `Way`."""
        if self.commit.record is None:
            self.manager.finish(self.commit)


class TorchSave(Way):
    """``torch.save`` and fsync."""

    def begin(self, training: Training) -> None:
        """All of it."""
        with (self.path() / "state.pt").open("wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())


class DcpSave(Way):
    """``torch.distributed.checkpoint.save``."""

    def begin(self, training: Training) -> None:
        """All of it."""
        dcp.save(training.state(), checkpoint_id=self.path(), no_dist=True)


class DcpAsync(Way):
    """``torch.distributed.checkpoint.async_save``."""

    def begin(self, training: Training) -> None:
        """Copy the state, and write it in a thread."""
        self.future: Any = dcp.async_save(training.state(), checkpoint_id=self.path(), no_dist=True)

    def end(self) -> None:
        """See `Way`."""
        self.future.result()


class Duration(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def duration(action: Callable[[], Any]) -> Duration:
    """How long something takes this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Duration(time.perf_counter() - wall, time.process_time() - cpu)


def memcpy(tensors: list[Tensor], target: Tensor) -> None:
    """One copy of all tensors into memory that was touched before."""
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        target[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def round_s(training: Training, way: Way | None, steps: int) -> tuple[Duration, float]:
    """Stall and wall time of a round."""
    stall = Duration(0.0, 0.0)
    started = time.perf_counter()
    for number in range(steps):
        training.step()
        if way is None:
            continue
        if number == SAVE_AT:
            stall = duration(partial(way.begin, training))
        elif number > SAVE_AT:
            way.poll()
    if way is not None:
        way.end()
    return stall, time.perf_counter() - started


def compare(training: Training, rounds: int, steps: int, directory: Path) -> None:
    """Print stall and extra time of each way."""
    kinds: list[Callable[[Path], Way]] = [Ours, DcpAsync, DcpSave, TorchSave]
    names = ["ours", "DCP async_save", "DCP save", "torch.save"]
    ways: dict[str, Way] = {}
    for name, kind in zip(names, kinds, strict=True):
        place = directory / name.replace(" ", "_")
        place.mkdir()
        ways[name] = kind(place)
    tensors = training.tensors()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    target = torch.zeros(size, dtype=torch.uint8)
    for way in ways.values():  # memory is touched, processes are started
        round_s(training, way, steps)
    stalls: dict[str, list[Duration]] = {name: [] for name in names}
    extras: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            for old in directory.glob("*/tmp*"):
                shutil.rmtree(old)
            with torch.no_grad():
                copies = [duration(partial(memcpy, tensors, target)) for _ in range(3)]
            _, before = round_s(training, None, steps)
            stall, wall = round_s(training, ways[name], steps)
            _, after = round_s(training, None, steps)
            stalls[name].append(
                Duration(*(took / min(of) for took, of in zip(stall, zip(*copies, strict=True), strict=True)))
            )
            extras[name].append(wall - (before + after) / 2)
    reference = statistics.median(extras["DCP async_save"])
    print(f"{size / 1e6:.0f} MB of state, {rounds} rounds of {steps} steps, {torch.get_num_threads()} threads")
    for name in names:
        extra = statistics.median(extras[name])
        wall, cpu = map(statistics.median, zip(*stalls[name], strict=True))
        print(
            f"{name:15}  stall {wall:6.2f} x memcpy, {cpu:6.2f} in CPU time"
            f"   extra {extra:6.2f} s = {extra / reference:5.2f} x DCP async_save"
        )


def pss_bytes() -> int:
    """Memory of this process and its children; what they share counts once."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for pid in [str(me), *children]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def peak_bytes(action: Callable[[], Any]) -> int:
    """How much memory this process and its children take at most while something is done."""
    peak, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.02):
            peak = max(peak, pss_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    is_over.set()
    watcher.join()
    return peak


def measure_memory(training: Training, directory: Path) -> None:
    """Print how much more memory training takes at its peak where it saves."""
    steps = SAVE_AT + 3
    alone = peak_bytes(lambda: [round_s(training, None, steps) for _ in range(3)])
    way = Ours(directory)
    saving = peak_bytes(lambda: [round_s(training, way, steps) for _ in range(3)])
    size = sum(tensor.numel() * tensor.element_size() for tensor in training.tensors())
    print(
        f"state {size / 1e6:.0f} MB; checkpoints add {(saving - alone) / 1e6:.0f} MB at most: one snapshot and ", end=""
    )
    print(f"{(saving - alone - size) / 1e6:.0f} MB")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=125.0, help="of parameters")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="of a round; writing should end before it does")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    training = Training(arguments.millions)
    with tempfile.TemporaryDirectory() as directory:
        if arguments.memory:
            measure_memory(training, Path(directory))
        else:
            compare(training, arguments.rounds, arguments.steps, Path(directory))


if __name__ == "__main__":
    main()
