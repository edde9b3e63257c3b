"""Kill -9 at fifty seeded moments of saves: each time the run goes on from a whole checkpoint and ends bit-equal.

Thirty in the middle of a write, a sync, a rename or a deletion on a disk; ten in the middle of an upload to an
object store; ten at any time while a process beside the training writes.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import FORKSERVER_IMPORTS, assert_same, prepare, run

from ray_trainer.checkpoint import list_checkpoints, manager, verify

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*FORKSERVER_IMPORTS, "pyarrow.fs"])
SAVES = {
    "save_every_n_steps": 1,
    "keep_last_n": 1,
    "keep_best_k": 1,
    "overlapping_saves": "wait",
}  # each save deletes one that came before
CHANGES_OF_A_DISK = ("write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


class Countdown:
    """Kills this process at the n-th call that changes something of a checkpoint on the disk."""

    def __init__(self, calls: int) -> None:
        self._left = calls
        for name in CHANGES_OF_A_DISK:
            self._watch(name)

    def _watch(self, name: str) -> None:
        call = getattr(os, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            if any("checkpoint_epoch" in place for place in map(place_of, [*arguments, *named.values()])):
                self._left -= 1
                if self._left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "write":  # a system may write less than it was asked to; who asked goes on with the rest
                    descriptor, data = arguments
                    arguments = descriptor, data[: len(data) // 2 or None]
            return call(*arguments, **named)

        setattr(os, name, counted)


def place_of(argument: Any) -> str:
    """The path that an argument of a call to the system means."""
    if type(argument) is int:
        try:
            return str(Path(f"/proc/self/fd/{argument}").readlink())
        except OSError:
            return ""
    return str(argument) if isinstance(argument, str | Path) else ""


def train(run_dir: str, calls: int | None, stepped: Any) -> None:
    """One start of the run, in a process of its own, killed at a call or from outside."""
    torch.set_num_threads(1)
    if calls is None:
        manager.SMALL_BYTES = 0  # as what is large: it is written by one more process
    else:
        Countdown(calls)
    prepared = prepare(Path(run_dir), **SAVES | {"checkpoint_dir": run_dir})

    def tell(name: str, count: int) -> None:
        if name == "on_step_end" and calls is None:
            stepped.value += 1
            time.sleep(0.03)

    prepared.diary.on_call = tell
    prepared.trainer.train(prepared.train_set, prepared.val_set, "auto")


def start(run_dir: Any, calls: int | None) -> tuple[Any, Any]:
    stepped = PROCESSES.Value("i", 0)
    process = PROCESSES.Process(target=train, args=(str(run_dir), calls, stepped))
    process.start()
    return process, stepped


def kill_again_and_again(run_dir: Any, kills: int, die: Callable[[], tuple[Any, Any]]) -> None:
    """Start the run, let it die, look at what is listed; so many times."""
    for _ in range(kills):
        process, _ = die()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL  # the fault fired
        listed = list_checkpoints(run_dir)
        assert [problem for record in listed for problem in verify(run_dir, record.name)] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), **SAVES)


@pytest.mark.parametrize("seed", range(3))
def test_run_killed_within_the_changes_that_saves_make_on_a_disk_ends_bit_equal(tmp_path, undisturbed, seed):
    moments = random.Random(seed)

    kill_again_and_again(tmp_path, kills=10, die=lambda: start(tmp_path, moments.randrange(90)))

    assert_same(run(tmp_path, **SAVES), undisturbed)


def test_run_killed_within_uploads_ends_bit_equal(s3_server, undisturbed):
    """The server kills, when it has received a request and before it answers."""
    moments = random.Random(0)
    uri = s3_server.uri(f"{s3_server.new_bucket()}/run")

    def die() -> tuple[Any, Any]:
        process, stepped = start(uri, None)
        left = iter(range(moments.randrange(12), -1, -1))

        def kill(method: str, path: str) -> bool:
            if method in ("PUT", "POST", "DELETE") and "checkpoint_epoch" in path and next(left, 0) == 0:
                os.kill(process.pid, signal.SIGKILL)
            return False

        with s3_server.refusing(kill):
            process.join(120)
        return process, stepped

    kill_again_and_again(uri, kills=10, die=die)
    ended = prepare(Path("unused"), **SAVES | {"checkpoint_dir": uri})
    ended.trainer.train(ended.train_set, ended.val_set, "auto")

    assert_same(ended.model.state_dict(), undisturbed.weights)
    assert_same(ended.trainer.optimizer.state_dict(), undisturbed.optimizer)
    assert_same(ended.diary.order, undisturbed.order)


def test_run_killed_while_a_process_beside_it_writes_ends_bit_equal(tmp_path, undisturbed):
    moments = random.Random(0)

    def die() -> tuple[Any, Any]:
        process, stepped = start(tmp_path, None)
        while stepped.value < 1 and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.random() * 0.06)
        os.kill(process.pid, signal.SIGKILL)
        return process, stepped

    kill_again_and_again(tmp_path, kills=10, die=die)

    assert_same(run(tmp_path, **SAVES), undisturbed)
