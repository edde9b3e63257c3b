"""Two processes want one run: nobody's checkpoints are harmed, and what is left is one undisturbed run."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cluster_runs import kill, whole_lines
from experiments import FORKSERVER_IMPORTS, POINTS, Network, Points, assert_same, metric_rows, settings

from ray_trainer import Trainer
from ray_trainer.checkpoint import list_checkpoints, verify
from ray_trainer.errors import RayTrainerError
from ray_trainer.runtime import LocalRuntime
from ray_trainer.storage.lease import Terms

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(FORKSERVER_IMPORTS)
STEPS = 40
PATIENCE_S = 60


class Slow:
    """So that there is time to disturb it."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def on_step_end(self, record: object) -> None:
        time.sleep(self._step_s)


def train(run_dir: Path, terms: Terms | None = None, step_s: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = Network()
    config = settings(run_dir, epochs=100, max_steps=STEPS, save_every_n_steps=5, log_every_n_steps=1)
    runtime = LocalRuntime(str(run_dir), terms=terms)
    trainer = Trainer(model, SimpleNamespace(), config, POINTS, Slow(step_s), runtime=runtime)
    trainer.train(Points(19), Points(7, seed=1), resume_from="auto")
    return model.state_dict()


def train_as_a_program(run_dir: Path, log: Path, terms: Terms, step_s: float) -> None:
    torch.set_num_threads(1)
    with log.open("w") as out:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    try:
        train(run_dir, terms, step_s)
    except RayTrainerError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)


@contextmanager
def program(run_dir: Path, name: str, terms: Terms | None = None, step_s: float = 0.0):
    log = run_dir.parent / f"{name}.log"
    process = PROCESSES.Process(target=train_as_a_program, args=(run_dir, log, terms or Terms(), step_s))
    process.start()
    try:
        yield SimpleNamespace(process=process, log=log)
    finally:
        process.kill()
        process.join()


def until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def wait_for_step(run_dir: Path, step: int) -> None:
    until(lambda: any(row["step"] >= step for row in whole_lines(run_dir / "metrics.jsonl")), f"step {step}")


def ended(program: SimpleNamespace) -> tuple[int, str]:
    program.process.join(PATIENCE_S)
    return program.process.exitcode, program.log.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return SimpleNamespace(weights=train(run_dir), rows=metric_rows(run_dir))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def assert_whole_run(run_dir: Path, undisturbed: SimpleNamespace) -> None:
    records = list_checkpoints(run_dir)
    assert records[-1].step == STEPS
    assert [problem for record in records for problem in verify(run_dir, record.name)] == []
    assert_same(metric_rows(run_dir), undisturbed.rows)
    assert_same(train(run_dir), undisturbed.weights)  # a finished run gives its weights back


def test_second_process_is_refused_and_the_first_ends_as_if_alone(run_dir, undisturbed):
    with program(run_dir, "first", step_s=0.05) as first:
        wait_for_step(run_dir, 5)
        with program(run_dir, "second") as second:
            code, output = ended(second)
        assert code == 1
        assert f"in use by process {first.process.pid} of" in output
        assert "--take-over" in output
        assert ended(first)[0] == 0

    assert {row["attempt"] for row in whole_lines(run_dir / "events.jsonl")} == {1}
    assert_whole_run(run_dir, undisturbed)


def test_killed_process_is_followed_at_once(run_dir, undisturbed):
    with program(run_dir, "first", step_s=0.05) as first:
        wait_for_step(run_dir, 12)
        kill(first.process.pid)
        with program(run_dir, "second") as second:
            code, output = ended(second)

    assert code == 0, output
    assert "which is dead" in output
    assert "Watching" not in output
    assert_whole_run(run_dir, undisturbed)


def test_paused_process_loses_the_run_and_can_not_save_when_it_wakes_up(run_dir, undisturbed):
    terms = Terms(lease_s=1.0, renew_s=0.2)
    with program(run_dir, "first", terms, step_s=0.05) as first:
        wait_for_step(run_dir, 12)
        os.kill(first.process.pid, signal.SIGSTOP)
        time.sleep(terms.lease_s)
        with program(run_dir, "second", terms) as second:
            code, output = ended(second)
            assert code == 0, output
        assert "Watching" in output
        before = sorted(path for path in run_dir.rglob("*") if "tensorboard" not in path.parts)

        os.kill(first.process.pid, signal.SIGCONT)
        code, output = ended(first)

    assert code == 1, output
    assert f"LeaseLostError: {run_dir} was taken over by process {second.process.pid}" in output
    assert sorted(path for path in run_dir.rglob("*") if "tensorboard" not in path.parts) == before
    assert_whole_run(run_dir, undisturbed)
