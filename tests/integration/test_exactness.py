"""One process, interrupted wherever it can be, ends as if it had never been; to the bit."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import (
    FORKSERVER_IMPORTS,
    assert_each_sample_once_an_epoch,
    assert_same,
    carry_out,
    events,
    prepare,
    run,
)

NUM_STEPS = 10  # two epochs of five, the last of each with three (or two) samples instead of four
VARIANTS = {
    "plain": {},
    "norm": {"norm": True},
    "validated by steps": {"validate_every_n_steps": 2, "save_every_n_steps": 3, "log_every_n_steps": 1},
}
HOOK_CALLS = [
    ("on_epoch_start", 1), ("on_epoch_start", 2), ("on_batch_end", 5), ("on_batch_end", 10), ("on_validation_end", 1),
    ("on_validation_end", 2), ("on_checkpoint_saved", 1), ("on_epoch_end", 1), ("on_epoch_end", 2),
]  # fmt: skip


class BrokenOffError(Exception):
    """Raised where a run shall be broken off."""


def interrupt() -> None:
    raise BrokenOffError


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    made: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in made:
            made[variant] = run(tmp_path_factory.mktemp("unbroken"), **VARIANTS[variant])
        return made[variant]

    return get


def arm(prepared: SimpleNamespace, at: tuple[str, int], act: Any = interrupt) -> SimpleNamespace:
    prepared.diary.act(*at, act)
    return prepared


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_run_broken_off_by_a_hook_after_any_step_ends_as_if_it_had_not_been(tmp_path, unbroken, variant, step):
    with pytest.raises(BrokenOffError):
        carry_out(arm(prepare(tmp_path, **VARIANTS[variant]), ("on_step_end", step)))

    resumed = run(tmp_path, **VARIANTS[variant])

    assert_same(resumed, unbroken(variant))
    assert_each_sample_once_an_epoch(resumed, 18 if variant == "norm" else 19)
    assert events(tmp_path, "resumed")[0]["step"] == step


@pytest.mark.parametrize("at", HOOK_CALLS, ids=lambda at: f"{at[0]}-{at[1]}")
def test_run_broken_off_by_any_other_hook_ends_as_if_it_had_not_been(tmp_path, unbroken, at):
    with pytest.raises(BrokenOffError):
        carry_out(arm(prepare(tmp_path), at))

    resumed = run(tmp_path)

    if at[0] == "on_batch_end":  # the diary did not get to hear of that step
        resumed.order = unbroken("plain").order
    assert_same(resumed, unbroken("plain"))


@pytest.mark.parametrize("call", [1, 3])
def test_run_broken_off_by_the_validation_hook_within_an_epoch_ends_as_if_it_had_not_been(tmp_path, unbroken, call):
    variant = VARIANTS["validated by steps"]
    with pytest.raises(BrokenOffError):
        carry_out(arm(prepare(tmp_path, **variant), ("on_validation_end", call)))

    assert_same(run(tmp_path, **variant), unbroken("validated by steps"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, 5, 9, 10])
def test_run_stopped_by_a_signal_in_its_own_process_ends_as_if_it_had_not_been(tmp_path, unbroken, number, step):
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    stopped = arm(prepare(tmp_path), ("on_step_end", step), lambda: os.kill(os.getpid(), number))

    with pytest.raises(expected) as caught:
        carry_out(stopped)
    resumed = run(tmp_path)

    assert number == signal.SIGINT or caught.value.code == 143
    assert_same(resumed, unbroken("plain"))


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.parametrize("step", [6, 7])
def test_run_broken_off_at_its_last_allowed_step_within_an_epoch_ends_as_if_it_had_not_been(tmp_path, by_signal, step):
    whole = run(tmp_path / "whole", max_steps=7)
    stopped = prepare(tmp_path / "broken", max_steps=7)
    arm(stopped, ("on_step_end", step), (lambda: signal.raise_signal(signal.SIGTERM)) if by_signal else interrupt)

    with pytest.raises((SystemExit, BrokenOffError)):
        carry_out(stopped)

    assert_same(run(tmp_path / "broken", max_steps=7), whole)


@pytest.mark.parametrize("variant", ["plain", "validated by steps"])
def test_signal_during_any_validation_loses_nothing(tmp_path, unbroken, variant):
    batches = sum(row["split"] == "val" for row in unbroken(variant).rows) * 4
    for moment in range(2, 2 + batches, 3):  # the first forward is the trial of the first batch
        stopped = prepare(tmp_path / str(moment), **VARIANTS[variant])
        forwards = iter(range(10_000))

        def stop(training: bool, moment: int = moment, forwards: Any = forwards) -> None:
            if not training and next(forwards) == moment:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped.model.on_forward = stop
        with pytest.raises(SystemExit):
            carry_out(stopped)

        assert_same(run(tmp_path / str(moment), **VARIANTS[variant]), unbroken(variant), f"stopped at {moment}")


@pytest.mark.parametrize("variant", ["plain", "norm"])
@pytest.mark.parametrize("read", [3, 4, 7, 18, 24, 35])
def test_dataset_that_fails_in_the_middle_of_a_step_loses_nothing(tmp_path, unbroken, variant, read):
    broken = prepare(tmp_path, **VARIANTS[variant])
    reads = 0

    def fail(index: int) -> None:
        nonlocal reads
        if broken.model.training and torch.is_grad_enabled():
            reads += 1
            if reads == read:
                raise OSError("the disk is gone")

    broken.train_set.on_read = fail
    with pytest.raises(ValueError, match="could not be read: OSError: the disk is gone"):
        carry_out(broken)

    assert_same(run(tmp_path, **VARIANTS[variant]), unbroken(variant))


@pytest.mark.parametrize("variant", ["plain", "norm"])
@pytest.mark.parametrize("forward", [2, 4, 9, 12, 17])
def test_forward_that_fails_in_the_middle_of_an_accumulation_window_loses_nothing(tmp_path, unbroken, variant, forward):
    broken = prepare(tmp_path, **VARIANTS[variant])
    forwards = 0

    def fail(training: bool) -> None:
        nonlocal forwards
        forwards += int(training)
        if training and forwards == forward:
            raise BrokenOffError

    broken.model.on_forward = fail
    with pytest.raises(BrokenOffError):
        carry_out(broken)

    assert_same(run(tmp_path, **VARIANTS[variant]), unbroken(variant))


def test_run_broken_off_again_and_again_after_each_single_step_ends_as_if_it_had_not_been(tmp_path, unbroken):
    for step in range(1, NUM_STEPS + 1):
        with pytest.raises(BrokenOffError):
            carry_out(arm(prepare(tmp_path), ("on_step_end", step)))

    resumed = run(tmp_path)

    assert_same(resumed, unbroken("plain"))
    assert len(events(tmp_path, "resumed")) == NUM_STEPS


def test_loader_processes_do_not_change_what_a_broken_off_run_ends_with(tmp_path, unbroken):
    with pytest.raises(BrokenOffError):
        carry_out(arm(prepare(tmp_path, num_loader_workers=1), ("on_step_end", 3)))

    assert_same(run(tmp_path, num_loader_workers=1), unbroken("plain"))


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(FORKSERVER_IMPORTS)


def train_slowly(run_dir: Path, stepped: Any) -> None:
    """A start of the run in a process of its own that tells each step and then dawdles a little."""
    torch.set_num_threads(1)
    prepared = prepare(run_dir, save_every_n_steps=1)

    def tell(name: str, count: int) -> None:
        if name == "on_step_end":
            stepped.value += 1
            time.sleep(0.05)

    prepared.diary.on_call = tell
    carry_out(prepared)


def start(run_dir: Path) -> tuple[Any, Any]:
    stepped = PROCESSES.Value("i", 0)
    process = PROCESSES.Process(target=train_slowly, args=(run_dir, stepped))
    process.start()
    return process, stepped


def wait_for(stepped: Any, step: int, process: Any) -> None:
    while stepped.value < step and process.is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_process_that_is_sent_a_signal_saves_and_another_one_ends_the_run_exactly(tmp_path, unbroken, number, code):
    process, stepped = start(tmp_path)
    wait_for(stepped, 3, process)
    os.kill(process.pid, number)
    process.join(60)

    assert process.exitcode == code  # multiprocessing reports KeyboardInterrupt as 1
    assert_same(run(tmp_path, save_every_n_steps=1), unbroken("plain"))
