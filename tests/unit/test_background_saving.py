"""Checkpoints that are written by a process beside training: the same result, and nothing lost with that process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from experiments import assert_same, carry_out, checkpoints, events, prepare, run
from safetensors.torch import load_file
from stalling import InSteps, StallingStorage, stop_for_good

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, manager, verify, writer
from ray_trainer.checkpoint.arena import Arena
from ray_trainer.errors import CheckpointError
from ray_trainer.storage import Storage
from ray_trainer.storage.beside import ProcessBeside
from ray_trainer.storage.fence import NoFence
from ray_trainer.storage.sealing import FileInMemory, WriteFiles
from ray_trainer.triggers import Backoff

STEPS = {"save_every_n_steps": 1, "save_every_n_epochs": None}


@pytest.fixture
def everything_beside(monkeypatch):
    """However small it is."""
    monkeypatch.setattr(manager, "SMALL_BYTES", 0)


@pytest.fixture
def process():
    arena = Arena(100)
    arena.memory[:100] = torch.arange(100, dtype=torch.uint8)
    beside = ProcessBeside(arena.descriptor)
    yield beside
    beside.close()
    arena.close()


def big_state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((2_000_000,), value)}}


def until_there(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_memory_that_is_prepared_too_late_does_not_take_the_place_of_what_the_process_sees(tmp_path):
    checkpoints = CheckpointManager(tmp_path)
    first = checkpoints.begin(big_state(1.0), {}, CheckpointMeta(epoch=0, step=1))
    checkpoints.prepare(big_state(1.0))  # as after a recovery that owed a checkpoint: it is under way already
    checkpoints.finish(first)

    second = checkpoints.finish(checkpoints.begin(big_state(2.0), {}, CheckpointMeta(epoch=0, step=2)))
    checkpoints.close()

    saved = load_file(tmp_path / second.name / "model.safetensors")
    assert torch.equal(saved["w"], torch.full((2_000_000,), 2.0))


def test_files_are_written_from_memory_with_their_checksums(tmp_path, process):
    process.submit(
        WriteFiles(
            Storage.open(tmp_path), (FileInMemory("a", 10, 5), FileInMemory("b", 0, 0), FileInMemory("c", 64, 36))
        )
    )
    written = process.result()

    assert (tmp_path / "a").read_bytes() == bytes(range(10, 15))
    assert (tmp_path / "b").read_bytes() == b""
    assert (tmp_path / "c").read_bytes() == bytes(range(64, 100))
    assert {name: file.size for name, file in written.items()} == {"a": 5, "b": 0, "c": 36}


def test_job_that_fails_raises_where_its_result_is_collected_and_the_next_one_works(tmp_path, process):
    (tmp_path / "file").touch()
    process.submit(WriteFiles(Storage.open(tmp_path / "file"), (FileInMemory("a", 0, 1),)))
    with pytest.raises(OSError, match="file"):
        process.result()

    process.submit(WriteFiles(Storage.open(tmp_path), (FileInMemory("a", 0, 1),)))
    assert process.result().keys() == {"a"}


def test_process_that_was_killed_is_an_error_of_the_job(tmp_path, process):
    os.kill(process.pid, signal.SIGSTOP)
    process.submit(WriteFiles(Storage.open(tmp_path), (FileInMemory("a", 0, 1),)))
    os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="exit code -9"):
        process.result()


def test_job_that_does_not_get_on_any_more_is_given_up_with_its_process(tmp_path):
    now_s = [100.0]
    arena = Arena(1)
    process = ProcessBeside(arena.descriptor, clock=lambda: now_s[0])
    process.submit(InSteps(tmp_path, steps=2), stalls_after_s=300.0)
    for step in range(2):
        assert not process.is_done()
        (tmp_path / f"go{step}").touch()
        until_there(tmp_path / f"gone{step}")
        now_s[0] += 299.0  # longer than the limit in the end, but it gets on

    assert not process.is_done()
    now_s[0] += 301.0
    assert process.is_done()
    with pytest.raises(TimeoutError, match=r"taken nothing of a checkpoint for 300 s.*can be written to"):
        process.result()

    assert process.has_ended()
    assert not is_running(process.pid)
    process.close()
    arena.close()


def test_process_leaves_signals_to_the_training_and_ends_when_it_is_closed(tmp_path, process):
    process.submit(WriteFiles(Storage.open(tmp_path), (FileInMemory("a", 0, 1),)))
    process.result()
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    process.submit(WriteFiles(Storage.open(tmp_path), (FileInMemory("b", 0, 1),)))
    assert process.result().keys() == {"b"}

    process.close()

    assert not is_running(process.pid)


def test_process_ends_with_a_training_that_is_killed(tmp_path):
    script = """
        import os, sys, torch
        from ray_trainer.checkpoint.arena import Arena
        from ray_trainer.storage.beside import ProcessBeside
        beside = ProcessBeside(Arena(1).descriptor)
        print(beside.pid, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        pid = int(training.stdout.readline())
        assert is_running(pid)
        training.kill()
        training.wait(10)
        deadline = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(pid)


def test_process_beside_needs_no_torch():
    code = "import sys, ray_trainer.storage.beside, ray_trainer.storage.sealing; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_snapshot_is_of_the_moment_it_was_taken_whatever_training_does_meanwhile(tmp_path):
    checkpoints_of = CheckpointManager(tmp_path)
    state = big_state(1.0)
    commit = checkpoints_of.begin(state, {}, CheckpointMeta(epoch=0, step=1))
    state["model"]["w"].fill_(2.0)

    record = checkpoints_of.finish(commit)
    checkpoints_of.close()

    assert not commit.is_immediate
    assert verify(tmp_path, record.name) == []
    weights = load_file(tmp_path / record.name / "model.safetensors")["w"]
    assert torch.equal(weights, torch.ones(2_000_000))
    assert 0 < commit.stall_s < commit.durable_s


def test_training_waits_for_all_of_a_checkpoint_that_is_written_at_once(tmp_path):
    checkpoints_of = CheckpointManager(tmp_path)
    state = {"model": {"w": torch.ones(3)}}
    commit = checkpoints_of.begin(state, {}, CheckpointMeta(epoch=0, step=1))

    checkpoints_of.finish(commit)

    assert commit.is_immediate
    assert commit.stall_s == commit.durable_s > 0


def test_snapshots_that_grow_and_shrink_reuse_or_replace_the_memory(tmp_path):
    checkpoints_of = CheckpointManager(tmp_path, keep_last_n=2, keep_best_k=0)
    for step, size in enumerate([2_000_000, 3_000_000, 1_500_000, 3_000_000], start=1):
        state = {"model": {"w": torch.full((size,), float(step)), "odd": torch.ones(3, dtype=torch.int8)}}
        record = checkpoints_of.finish(checkpoints_of.begin(state, {}, CheckpointMeta(epoch=0, step=step)))
        assert verify(tmp_path, record.name) == []
    checkpoints_of.close()

    assert [record.step for record in checkpoints_of.records()] == [3, 4]
    assert checkpoints(tmp_path) == [record.name for record in checkpoints_of.records()]


def test_checkpoint_whose_writer_was_killed_fails_and_the_next_one_is_whole(tmp_path):
    checkpoints_of = CheckpointManager(tmp_path)
    checkpoints_of.finish(checkpoints_of.begin(big_state(0.0), {}, CheckpointMeta(epoch=0, step=1)))
    writer = checkpoints_of._background._process.pid
    os.kill(writer, signal.SIGSTOP)
    commit = checkpoints_of.begin(big_state(1.0), {}, CheckpointMeta(epoch=0, step=2))
    os.kill(writer, signal.SIGKILL)
    os.waitid(os.P_PID, writer, os.WEXITED | os.WNOWAIT)  # it is gone before anybody asks for its result
    assert commit.is_done()
    with pytest.raises(CheckpointError, match="exit code -9"):
        checkpoints_of.finish(commit)

    record = checkpoints_of.finish(checkpoints_of.begin(big_state(2.0), {}, CheckpointMeta(epoch=0, step=3)))
    checkpoints_of.close()

    assert [int(name[-8:]) for name in checkpoints(tmp_path)] == [1, 3]
    assert verify(tmp_path, record.name) == []


class Locked(NoFence):
    """A fence that no other process can be given."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_job_that_can_not_be_handed_over_fails_the_save_and_not_the_training(tmp_path):
    checkpoints_of = CheckpointManager(Storage.open(tmp_path).fenced(Locked()))
    commit = checkpoints_of.begin(big_state(0.0), {}, CheckpointMeta(epoch=0, step=1))

    with pytest.raises(CheckpointError, match="cannot pickle"):
        checkpoints_of.finish(commit)
    checkpoints_of.close()


def test_run_saved_beside_training_equals_one_saved_at_once(tmp_path, everything_beside, monkeypatch):
    beside = run(tmp_path / "beside", overlapping_saves="wait", **STEPS)
    monkeypatch.undo()

    at_once = run(tmp_path / "at once", **STEPS)

    assert_same(beside, at_once)
    assert checkpoints(tmp_path / "beside") == checkpoints(tmp_path / "at once")
    saved = events(tmp_path / "beside", "checkpoint_saved")
    assert [row["step"] for row in saved] == list(range(1, 11))
    assert all(row["stall_s"] < row["durable_s"] for row in saved)


@pytest.mark.parametrize("overlapping_saves", ["skip", "wait"])
def test_save_that_is_under_way_asks_for_no_other_one(tmp_path, everything_beside, overlapping_saves):
    run(tmp_path, **STEPS | {"save_every_n_steps": 4, "overlapping_saves": overlapping_saves})

    assert {row["step"] for row in events(tmp_path, "checkpoint_saved")} - {8} == {4, 10}
    assert {row["step"] for row in events(tmp_path, "checkpoint_skipped")} <= {8}  # where that of step 4 takes long


def test_run_broken_off_and_continued_with_writing_beside_it_ends_the_same(tmp_path, everything_beside):
    whole = run(tmp_path / "whole", **STEPS)
    for step in (3, 7):
        broken = prepare(tmp_path / "broken", **STEPS)
        broken.diary.act("on_step_end", step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            carry_out(broken)

    assert_same(run(tmp_path / "broken", **STEPS), whole)
    assert [row["step"] for row in events(tmp_path / "broken", "resumed")] == [4, 8]


def test_save_that_comes_too_early_is_skipped_and_told_and_the_last_one_is_never_skipped(tmp_path, everything_beside):
    prepared = prepare(tmp_path, size=43, **STEPS)
    stopped: list[int] = []

    def stop_writer() -> None:
        stopped.append(prepared.trainer.checkpoint_manager._background._process.pid)
        os.kill(stopped[0], signal.SIGSTOP)

    def go_on() -> None:
        os.kill(stopped[0], signal.SIGCONT)

    prepared.diary.on_call = lambda name, count: {("on_step_end", 2): stop_writer, ("on_step_end", 8): go_on}.get(
        (name, count), lambda: None
    )()
    carry_out(prepared)

    skipped = events(tmp_path, "checkpoint_skipped")
    assert len(skipped) >= 1  # once for each checkpoint that another one would have overtaken
    assert 2 <= skipped[0]["step"] <= 8
    assert "is still being written" in skipped[0]["reason"]
    saved = [row["step"] for row in events(tmp_path, "checkpoint_saved")]
    assert not {4, 5, 6, 7} & set(saved)
    assert saved[-1] == prepared.trainer.progress.step


def test_writer_that_is_stopped_for_good_is_replaced_and_the_run_ends_as_if_it_had_not(
    tmp_path, everything_beside, monkeypatch
):
    monkeypatch.setattr(Backoff, "FIRST_S", 0.0)
    whole = run(tmp_path / "whole", overlapping_saves="wait", **STEPS)
    prepared = prepare(tmp_path / "stalled", overlapping_saves="wait", **STEPS)
    stopped: list[int] = []

    def on_call(name: str, count: int) -> None:
        if name == "on_step_end" and count in (4, 10):
            stopped.append(stop_for_good(prepared.trainer.checkpoint_manager._background._process))

    prepared.diary.on_call = on_call
    stalled = carry_out(prepared)

    failed = events(tmp_path / "stalled", "checkpoint_failed")
    assert len(failed) >= len(set(stopped)) == 2
    assert all("taken nothing of a checkpoint for 300 s" in row["reason"] for row in failed)
    assert not any(is_running(pid) for pid in stopped)
    assert events(tmp_path / "stalled", "checkpoint_saved")[-1]["step"] == stalled.step
    assert_same(stalled, whole)


def test_run_whose_storage_stalls_trains_on_and_tells_at_its_end_that_nothing_was_saved(
    tmp_path, everything_beside, monkeypatch
):
    monkeypatch.setattr(writer, "STALLS_AFTER_S", 2.0)
    prepared = prepare(tmp_path, **STEPS | {"save_every_n_steps": 4})
    prepared.trainer.checkpoint_manager.storage.__class__ = StallingStorage

    with pytest.raises(CheckpointError, match="can be written to"):
        carry_out(prepared)

    assert prepared.trainer.progress.step == 10
    failed = events(tmp_path, "checkpoint_failed")
    assert [row["step"] for row in failed][-2:] == [10, 10]  # the last one, which is tried once more at the end
    assert events(tmp_path, "checkpoint_saved") == []


def test_save_that_fails_again_and_again_ends_the_run_only_after_the_configured_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Backoff, "FIRST_S", 0.0)
    prepared = prepare(tmp_path, max_failed_saves=3, **STEPS)

    class Refusing(Storage):
        def write_chunks(self, name, chunks):
            if "step0000000" in self.path and int(self.path[-8:]) > 2:
                raise OSError(5, "Input/output error", self.path)
            super().write_chunks(name, chunks)

    prepared.trainer.checkpoint_manager.storage.__class__ = Refusing
    with pytest.raises(CheckpointError, match="Input/output error"):
        carry_out(prepared)

    assert [row["step"] for row in events(tmp_path, "checkpoint_failed")] == [3, 4, 5, 5]  # and after the error
    monkeypatch.undo()
    assert_same(run(tmp_path, **STEPS), run(tmp_path.with_name("whole"), **STEPS))
