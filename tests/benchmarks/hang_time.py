"""How long a run stands still when a rank hangs: asleep, in a regular expression, stopped, or past an exchange.

Run it with ``python tests/benchmarks/hang_time.py [--spare-workers 1]``. Two workers train a tiny network; four
times one of them hangs, each time in another way. Printed are seconds from the moment on at which it hangs: until
it was named, until the others noticed that it was ended, until it was replaced, and until the first step that had
not been done before; and whether the last weights are those of a run in which nothing hung.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from cluster_runs import newest_checkpoint, tensors, training, whole_lines, write_run_file  # noqa: E402
from experiments import assert_same  # noqa: E402
from hanging_experiment import BOTH, RANKS, mark_all, mark_of  # noqa: E402


def run(directory: Path, marks: Path, cluster: dict[str, Any]) -> Path:
    """A run's directory, once it has ended; what is marked has hung already."""
    run_file = write_run_file(
        directory / "run.yaml",
        experiment=f"{TESTS / 'hanging_experiment.py'}:experiment",
        model={"marks": str(marks)},
        training={
            "epochs": 8,
            "batch_size": 8,
            "save_every_n_epochs": None,
            "save_every_n_steps": 15,
            "log_every_n_steps": 1,
        },
        cluster={
            "num_workers": 2,
            "resources_per_worker": {"CPU": 0.5},  # so that a spare has room on two cores
            "name": "run",
            "storage_path": str(directory),
            **cluster,
        },
    )
    with training(run_file) as command:
        assert command.wait() == 0, command.output
    return command.run_dir


def seconds_of(run_dir: Path, marks: Path) -> dict[str, dict[str, float]]:
    """By kind, from the moment on at which a rank has hung."""
    events = whole_lines(run_dir / "events.jsonl")
    rows = {row["step"]: row["time"] for row in whole_lines(run_dir / "metrics.jsonl")}
    found = {}
    for kind, ranks in RANKS.items():
        if kind == BOTH:
            continue  # nobody is left, and all start again
        hung_at = mark_of(marks, kind, ranks[0]).stat().st_mtime
        hang, rejoined = (
            min((each for each in events if each["event"] == name and each["time"] > hung_at), key=lambda e: e["time"])
            for name in ("hang", "rejoined")
        )
        found[kind] = {
            "named": hang["time"] - hung_at,
            "ended": rejoined["noticed_at"] - hung_at,
            "replaced": rejoined["noticed_at"] + rejoined["waited_s"] - hung_at,
            "first new step": min(time for time in rows.values() if time > rejoined["noticed_at"]) - hung_at,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floor", type=float, help="`hang_floor_s`, if it is not to be the default")
    parser.add_argument("--spare-workers", type=int, default=0)
    arguments = parser.parse_args()
    cluster: dict[str, Any] = {"spare_workers": arguments.spare_workers}
    if arguments.floor is not None:
        cluster["hang_floor_s"] = arguments.floor
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as hanging:
        mark_all(Path(whole))
        undisturbed = run(Path(whole), Path(whole), cluster)
        run_dir = run(Path(hanging), Path(hanging), cluster)
        found = seconds_of(run_dir, Path(hanging))
        assert_same(*(tensors(newest_checkpoint(each)) for each in (undisturbed, run_dir)))
    print(f"{'':16}" + "".join(f"{kind:>8}" for kind in found))
    for name in next(iter(found.values())):
        print(f"{name:16}" + "".join(f"{seconds[name]:8.1f}" for seconds in found.values()))
    print("same weights as without a hang")


if __name__ == "__main__":
    main()
