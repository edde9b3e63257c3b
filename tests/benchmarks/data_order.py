"""What it costs to find a place in the order of ten billion samples, in time and memory.

Run it with ``python tests/benchmarks/data_order.py``. For each size of dataset: a fresh order is asked for 1,024
indices at 1 % and at 90 % of an epoch, one after the other, a new epoch each time; medians are printed, and the most
memory that was allocated at once. The largest size stands once fully shuffled and once in windows of blocks.
"""

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from ray_trainer.data.order import SampleOrder

COUNT = 1024
ROWS_A_BLOCK = 65536


def in_windows(num_samples: int) -> SampleOrder:
    sizes = np.full(-(-num_samples // ROWS_A_BLOCK), ROWS_A_BLOCK)
    sizes[-1] -= sizes.sum() - num_samples
    return SampleOrder(num_samples, 42, block_sizes=sizes)


def seek_s(make: Callable[[int], SampleOrder], num_samples: int, epoch: int, share: float) -> float:
    """Seconds to the first indices of an epoch in progress."""
    order = make(num_samples)
    begin = time.perf_counter()
    found = order.indices(epoch, int(share * num_samples), int(share * num_samples) + COUNT)
    seconds = time.perf_counter() - begin
    assert len(np.unique(found)) == COUNT
    return seconds


def peak_bytes(make: Callable[[int], SampleOrder], num_samples: int) -> int:
    """The most memory that NumPy and Python held at once for a seek, the order itself included."""
    tracemalloc.start()
    make(num_samples).indices(0, int(0.9 * num_samples), int(0.9 * num_samples) + COUNT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(make: Callable[[int], SampleOrder], num_samples: int, rounds: int) -> dict[str, float]:
    early, late = [], []
    for turn in range(rounds):
        early.append(seek_s(make, num_samples, 2 * turn, 0.01))
        late.append(seek_s(make, num_samples, 2 * turn + 1, 0.9))
    return {
        "seek_us": statistics.median(late) * 1e6,
        "late_to_early": statistics.median(b / a for a, b in zip(early, late, strict=True)),
        "peak_bytes": peak_bytes(make, num_samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a seek in the order of samples.")
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    kinds: dict[str, Callable[[int], SampleOrder]] = {
        "shuffled fully": lambda size: SampleOrder(size, 42),
        "in windows": in_windows,
    }
    results = {}
    print(f"{COUNT} indices of a fresh epoch; in windows of 8 blocks of {ROWS_A_BLOCK} rows")
    print(f"{'':16s} {'samples':>14s} {'seek':>10s} {'90 % : 1 %':>11s} {'memory':>10s}")
    for kind, make in kinds.items():
        for size in (10**6, 10**8, 10**10):
            row = results[f"{kind}, {size}"] = measure(make, size, rounds)
            seek, ratio, memory = row["seek_us"], row["late_to_early"], row["peak_bytes"]
            print(f"{kind:16s} {size:14,d} {seek:7.0f} us {ratio:11.2f} {memory / 1e6:7.2f} MB")
    print(json.dumps({"numpy": np.__version__, **results}))


if __name__ == "__main__":
    main()
