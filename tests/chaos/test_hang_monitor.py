"""Real processes that hang, work, or wait for each other, each with its monitor; all at the same time."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiments import events
from watched_worker import FLOOR_S, STEPS

from ray_trainer.chaos.processes import identity, is_alive, kill

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]

WORKER = Path(__file__).parents[1] / "watched_worker.py"
ENDS_WITHIN_S = 60  # what takes four seconds on a machine that does nothing else


class Workers:
    """Of all kinds, started together."""

    def __init__(self, directory: Path, *kinds: str) -> None:
        self.dirs = {kind: directory / kind for kind in kinds}
        self._desk = directory / "desk"
        self._processes = {kind: self._start(kind) for kind in kinds}

    def _start(self, kind: str) -> "subprocess.Popen[str]":
        self.dirs[kind].mkdir()
        arguments = [kind, str(self.dirs[kind]), *([str(self._desk)] if kind in ("wait", "skip") else [])]
        return subprocess.Popen([sys.executable, str(WORKER), *arguments], stderr=subprocess.PIPE, text=True)

    def end_of(self, kind: str) -> tuple[int, str]:
        """Its exit code and what was printed."""
        _, errors = self._processes[kind].communicate(timeout=ENDS_WITHIN_S)
        return self._processes[kind].returncode, errors

    def is_running(self, kind: str) -> bool:
        return self._processes[kind].poll() is None

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    started = Workers(
        tmp_path_factory.mktemp("workers"),
        "sleep",
        "regex",
        "stop",
        "work",
        "excused",
        "save",
        "thread",
        "wait",
        "skip",
    )
    yield started
    started.close()


@pytest.mark.parametrize(
    ("kind", "phase", "place"),
    [("sleep", "forward", "in <lambda>"), ("regex", "data", "in match"), ("stop", "save", "in stop")],
)
def test_worker_that_hangs_is_named_with_its_stack_and_ended(workers, kind, phase, place):
    code, errors = workers.end_of(kind)

    assert code == -signal.SIGKILL, errors
    (hang,) = events(workers.dirs[kind], "hang")
    assert (hang["rank"], hang["phase"], hang["step"]) == (0, phase, STEPS - 1)
    assert hang["seconds"] >= FLOOR_S
    assert place in hang["last_lines"][0]
    stacks = (workers.dirs[kind] / hang["stack"]).read_text()
    assert f"{place.removeprefix('in ')}\n" in stacks
    assert "_take_turns" in stacks  # all threads
    assert re.search(rf"Rank 0 hangs: \d+ s without a sign of life in {phase} after step {STEPS - 1}", errors)


def test_worker_of_which_another_thread_holds_the_gil_is_ended_although_it_waits_for_others(workers):
    code, errors = workers.end_of("thread")

    assert code == -signal.SIGKILL, errors
    (hang,) = events(workers.dirs["thread"], "hang")
    assert hang["phase"] == "exchange"
    assert "another thread" in hang["reason"]
    assert "in hold_the_gil" in (workers.dirs["thread"] / hang["stack"]).read_text()


def test_of_two_workers_that_wait_for_each_other_the_one_that_skipped_an_exchange_is_ended(workers):
    code, errors = workers.end_of("skip")

    assert code == -signal.SIGKILL, errors
    (hang,) = events(workers.dirs["skip"], "hang")
    assert (hang["rank"], hang["step"]) == (1, STEPS)
    assert "ahead of an exchange" in hang["reason"]
    assert workers.is_running("wait")
    assert not (workers.dirs["wait"] / "events.jsonl").exists()


@pytest.mark.parametrize("kind", ["work", "excused", "save"])
def test_worker_that_works_saves_or_was_ended_here_before_is_left_alone(workers, kind):
    code, errors = workers.end_of(kind)

    assert (code, errors) == (0, "")
    assert not (workers.dirs[kind] / "events.jsonl").exists()


def test_monitor_ends_with_its_worker(tmp_path):
    workers = Workers(tmp_path, "save")
    told = tmp_path / "save" / "monitor"
    until = time.monotonic() + ENDS_WITHIN_S
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    monitor = int(told.read_text())
    process = identity(monitor)
    command = Path(f"/proc/{monitor}/cmdline").read_text()

    kill(workers._processes["save"].pid)

    while is_alive(process):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "ray_trainer.pulse.process" in command
    workers.close()


def test_monitor_imports_neither_torch_nor_ray_nor_what_storage_needs():
    program = "import json, sys, ray_trainer.pulse.process; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)

    assert "ray_trainer.pulse.watch" in modules
    assert not {"torch", "ray", "pyarrow", "numpy"} & set(modules)
