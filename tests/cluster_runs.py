"""Runs on Ray as a user starts them: the command line as a process of its own, watched and killed from outside.

Processes are found through /proc, so this works on Linux only, and nothing but what a test itself has started is
ever touched.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import ray
import yaml
from experiments import assert_same, metric_rows
from safetensors.torch import load_file

from ray_trainer.chaos.processes import Identity, command_line, descendants, end, identity, is_alive
from ray_trainer.chaos.processes import kill as kill  # for the tests

T = TypeVar("T")

PATIENCE_S = 240  # for what takes ten seconds on a machine that does nothing else
#: What may be left of the Ray of a killed driver, and can do nothing to the run any more: Ray 2.60's controller may
#: hang at its end if it loses Ray while it starts, and the agents stay for another minute.
OUTLIVING = ("ray::TrainController", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


@contextmanager
def ray_of_two_cpus() -> Iterator[None]:
    """A Ray of this process, which `fit` then uses."""
    with short_directory() as temp_dir:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            _temp_dir=temp_dir,
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def short_directory() -> Iterator[str]:
    """Where Ray may keep its sockets, whose paths must not be longer than 107 characters."""
    path = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_run_file(path: Path, **sections: Any) -> Path:
    """A run file with these sections."""
    path.write_text(yaml.safe_dump(sections))
    return path


class Command:
    """``ray-trainer train``, or another command, in a process group of its own.

    Attributes:
        run_dir: of the run that it trains, or of the sweep.
    """

    def __init__(
        self,
        run_file: Path,
        ray_temp_dir: str,
        log: IO[bytes],
        command: str = "train",
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        cluster = yaml.safe_load(run_file.read_text())["cluster"]
        self.run_dir = Path(cluster["storage_path"], cluster["name"])
        hidden = ("RAY_ADDRESS", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self._log = log
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "ray_trainer", command, str(run_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment | {"RAY_TMPDIR": ray_temp_dir} | dict(variables or {}),
            start_new_session=True,
        )
        self.seen: set[Identity] = set()

    @property
    def pid(self) -> int:
        """Of the command itself, the driver of its run."""
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return os.pread(self._log.fileno(), 10_000_000, 0).decode()

    def wait(self) -> int:
        """The exit code; negative if a signal ended it."""
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command did not end:\n{self.output}") from None

    def wait_for_step(self, step: int) -> int:
        """The newest step of the run, once it is at least this one."""

        def newest() -> int | None:
            assert self._process.poll() is None, f"the command ended early:\n{self.output}"
            steps = [row["step"] for row in whole_lines(self.run_dir / "metrics.jsonl")]
            return steps[-1] if steps and steps[-1] >= step else None

        return self.until(newest, f"step {step}")

    @contextmanager
    def held_at(self, step: int) -> Iterator[int]:
        """From this step on the workers stand still inside, so that the run cannot end while a test looks at it."""
        newest = self.wait_for_step(step)
        workers = self._workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield newest
        finally:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def worker_pid(self, rank: int) -> int:
        """The process of a rank, of those that were started last."""

        def found() -> int | None:
            started = [row for row in whole_lines(self.run_dir / "events.jsonl") if row["event"] == "workers_started"]
            pid = int(started[-1]["pids"][rank]) if started else -1
            return pid if pid in self._workers() else None

        return self.until(found, f"the worker of rank {rank}")

    def started_pids(self) -> list[int]:
        """The processes of all ranks, wherever they are, of those that were started last."""
        started = [row for row in whole_lines(self.run_dir / "events.jsonl") if row["event"] == "workers_started"]
        return [int(pid) for pid in started[-1]["pids"]]

    def actor_pid(self, name: str) -> int:
        """The process of the only actor of a class."""

        def found() -> int | None:
            pids = [pid for pid in self._family() if command_line(pid).startswith(f"ray::{name}")]
            return pids[0] if len(pids) == 1 else None

        return self.until(found, f"the actor {name}")

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        self._family()
        self._process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """A signal to all processes of the group, as a terminal does after Ctrl-C and `timeout` with SIGTERM."""
        self._family()
        os.killpg(self._process.pid, number)

    def wait_until_nothing_is_left(self, but: tuple[str, ...] = ()) -> None:
        """Until no process of the command or of its Ray, as far as they were seen, is alive.

        Args:
            but: processes whose title begins so are let alone once all others are gone.
        """

        def is_over() -> bool | None:
            left = [command_line(process.pid) for process in self.seen if is_alive(process)]
            return all(line.startswith(but) for line in left) or None

        self.until(is_over, "the end of all processes")

    def look(self) -> None:
        """Remember the processes that there are, for `wait_until_nothing_is_left`."""
        self._family()

    def close(self) -> None:
        """End whatever is left of it."""
        self._family()
        end(self.seen)
        self._process.wait()

    def _workers(self) -> list[int]:
        return [pid for pid in self._family() if command_line(pid).startswith("ray::RayTrainWorker")]

    def _family(self) -> list[int]:
        """The command and all that descend from it; also remembered."""
        family = descendants(self._process.pid)
        self.seen |= {identity(pid) for pid in family}
        return family

    def until(self, look: Callable[[], T | None], what: str) -> T:
        """What is looked for, once it is there."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            before = time.monotonic()
            found = look()
            if found is not None:
                return found
            time.sleep(max(0.005, 5 * (time.monotonic() - before)))  # looking must not be what the machine does
        raise AssertionError(f"waited in vain for {what}:\n{self.output}")


@contextmanager
def training(
    run_file: Path, command: str = "train", prefix: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Command]:
    """``ray-trainer train RUN_FILE``, or another command, under way; nothing of it is alive afterwards."""
    with short_directory() as ray_temp_dir, tempfile.TemporaryFile() as log:
        running = Command(run_file, ray_temp_dir, log, command, prefix, variables)
        try:
            yield running
        finally:
            running.close()


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file that somebody may be writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest_checkpoint(run_dir: Path) -> Path:
    return max(run_dir.glob("checkpoint_epoch*/manifest.json"), key=lambda path: path.parent.name[-8:]).parent


def step_of(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "manifest.json").read_text())["step"])


def checkpoints_of(run_dir: Path) -> list[int]:
    """The steps of the whole checkpoints."""
    return sorted(step_of(path.parent) for path in run_dir.glob("checkpoint_epoch*/manifest.json"))


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Weights and the optimizer's state."""
    return {name: load_file(checkpoint / name) for name in TENSOR_FILES}


def assert_same_run(whole: Path, other: Path) -> None:
    """Same last step, same tensors to the bit, same metrics, each of them once."""
    assert newest_checkpoint(whole).name == newest_checkpoint(other).name
    assert_same(tensors(newest_checkpoint(whole)), tensors(newest_checkpoint(other)))
    assert_same(metric_rows(whole), metric_rows(other))
    assert_each_row_once(other)


def assert_times_add_up(run_dir: Path, killed_at: float, told: dict[str, Any], *phases: str) -> None:
    """From a kill to the first step after it, an event that tells of the recovery has times that can be true."""
    assert killed_at <= told["noticed_at"]
    assert all(told[phase] >= 0 for phase in phases)
    rows = [row["time"] for row in whole_lines(run_dir / "metrics.jsonl") if row["step"] > told["step"]]
    assert told["noticed_at"] + sum(told[phase] for phase in phases) <= told["time"] <= min(rows)


def assert_each_row_once(run_dir: Path) -> None:
    keys = [(row["split"], row["step"]) for row in metric_rows(run_dir)]
    assert len(keys) == len(set(keys))


@contextmanager
def stopped_controllers() -> Iterator[None]:
    """Ray's controllers stand still inside, as one does that waits for a worker for which there is no room."""
    pids = [pid for pid in descendants(os.getpid()) if command_line(pid).startswith("ray::TrainController")]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
