import errno
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from ray_trainer.checkpoint import (
    CheckpointManager,
    CheckpointMeta,
    list_checkpoints,
    verify,
)
from ray_trainer.checkpoint import manifest as manifest_module
from ray_trainer.checkpoint.restore import load
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, NewerFormatError
from ray_trainer.storage import Storage

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "trainer.safetensors",
    "trainer.json",
    "rank00000.safetensors",
    "rank00000.json",
    "manifest.json",
]


def commit(manager, step, **metrics):
    generator = torch.Generator().manual_seed(step)
    state = {
        "model": {"weight": torch.randn(8, 4, generator=generator)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(8, 4, generator=generator)}}},
        "progress": {"step": step},
        "ema": torch.randn(3, generator=generator),
    }
    rank_state = {"loader": {"seen": torch.tensor(step), "position": step}}
    return manager.commit(state, rank_state, CheckpointMeta(epoch=0, step=step, metrics=metrics))


def name_of(step):
    return f"checkpoint_epoch0000_step{step:08d}"


def on_disk(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.fixture
def run(tmp_path):
    """A run with whole checkpoints of the steps 1, 2 and 3."""
    manager = CheckpointManager(tmp_path / "run")
    for step in (1, 2, 3):
        commit(manager, step)
    return tmp_path / "run"


def truncate(path, run):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path, run):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, run):
    path.write_bytes(b"")


def delete(path, run):
    path.unlink()


def extend(path, run):
    path.write_bytes(path.read_bytes() + b"\0")


def zero(path, run):
    path.write_bytes(bytes(path.stat().st_size))


def become_a_directory(path, run):
    path.unlink()
    path.mkdir()


def swap(path, run):
    shutil.copy(run / name_of(2) / path.name, path)


def plant_pickle_bomb(path, run):
    path.write_bytes(pickle.dumps(Bomb(run.parent / "exploded")))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


DAMAGES = [truncate, halve, empty, delete, extend, zero, become_a_directory, swap, plant_pickle_bomb]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint_is_found_and_the_one_before_is_used(run, file, damage):
    path = run / name_of(3) / file
    before = path.read_bytes()
    damage(path, run)
    assert not path.is_file() or path.read_bytes() != before  # the fault fired

    assert verify(run, name_of(3)) != []
    loaded = CheckpointManager(run).restore("auto")

    assert loaded.state["progress"] == {"step": 2}
    assert loaded.rank_state["loader"]["seen"] == 2
    (rejection,) = loaded.rejected
    assert rejection.name == name_of(3)
    assert file in rejection.reason or (file == "manifest.json" and damage is swap)
    assert not (run.parent / "exploded").exists()
    assert [record.step for record in list_checkpoints(run)] == [1, 2]


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_found(run, file):
    """In each byte of the manifest, in a seeded choice of the others."""
    path = run / name_of(3) / file
    content = path.read_bytes()
    positions = range(len(content))
    if file != "manifest.json":
        positions = random.Random(0).sample(positions, min(60, len(content)))
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert verify(run, name_of(3)) != [], position

    loaded = CheckpointManager(run).restore()

    assert loaded.manifest.step == 2
    assert on_disk(run / f"{name_of(3)}.broken") == sorted([*FILES, "reason.txt"])


def test_checkpoint_of_another_step_in_its_place_is_what_its_manifest_says(run):
    shutil.rmtree(run / name_of(3))
    shutil.copytree(run / name_of(1), run / name_of(3))

    loaded = CheckpointManager(run).restore()

    assert loaded.manifest.step == 1
    assert loaded.state["progress"] == {"step": 1}


def test_broken_checkpoint_is_set_aside_with_its_reason(run):
    empty(run / name_of(3) / "model.safetensors", run)

    CheckpointManager(run).restore()

    assert on_disk(run) == [name_of(1), name_of(2), f"{name_of(3)}.broken"]
    reason = (run / f"{name_of(3)}.broken" / "reason.txt").read_text()
    assert reason == "model.safetensors has 0 bytes instead of 232\n"


def test_second_broken_one_of_the_same_step_gets_a_number(run):
    for _ in range(2):
        manager = CheckpointManager(run)
        if not (run / name_of(3)).exists():
            commit(manager, 3)
        empty(run / name_of(3) / "trainer.json", run)
        manager.restore()

    assert on_disk(run)[2:] == [f"{name_of(3)}.broken", f"{name_of(3)}.broken2"]


def test_step_that_was_broken_can_be_committed_and_restored_again(run):
    empty(run / name_of(3) / "trainer.json", run)
    manager = CheckpointManager(run)
    manager.restore()

    commit(manager, 3)

    assert manager.restore().manifest.step == 3
    assert [record.step for record in manager.records()] == [1, 2, 3]


def test_unfinished_save_is_reported_but_left_to_the_writer(run):
    delete(run / name_of(3) / "manifest.json", run)

    loaded = CheckpointManager(run).restore()

    assert loaded.rejected == [(name_of(3), "manifest.json is missing: the save was never finished")]
    assert name_of(3) in on_disk(run)


def test_run_whose_checkpoints_are_all_broken_never_starts_from_scratch_and_stays_as_it_is(run):
    for step in (1, 2, 3):
        halve(run / name_of(step) / "model.safetensors", run)

    for _ in range(2):
        with pytest.raises(CheckpointCorruptError, match=r"(?s)None of the checkpoints.*step00000003.*step00000001"):
            CheckpointManager(run).restore("auto")
    assert on_disk(run) == [name_of(1), name_of(2), name_of(3)]


def test_run_that_has_only_what_was_set_aside_never_starts_from_scratch(run):
    for step in (1, 2, 3):
        (run / name_of(step)).rename(run / f"{name_of(step)}.broken")

    with pytest.raises(CheckpointCorruptError, match="no whole checkpoint, but broken ones"):
        CheckpointManager(run).restore("auto")


def test_run_that_has_not_saved_yet_starts_fresh_when_asked_for_auto(tmp_path):
    manager = CheckpointManager(tmp_path / "run")

    assert manager.restore("auto") is None
    assert manager.restore(None) is None
    assert not (tmp_path / "run").exists()
    for which in ("newest", "best"):
        with pytest.raises(CheckpointNotFoundError, match="No checkpoints found"):
            manager.restore(which)


def test_run_killed_in_its_first_save_starts_fresh(run):
    for step in (2, 3):
        shutil.rmtree(run / name_of(step))
    delete(run / name_of(1) / "manifest.json", run)

    assert CheckpointManager(run).restore("auto") is None


def test_best_is_restored_and_a_broken_best_gives_way_to_the_next(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step, loss in ((1, 0.2), (2, 0.1), (3, 0.3), (4, float("nan"))):
        commit(manager, step, val_loss=loss)

    assert manager.restore("best").manifest.step == 2
    halve(tmp_path / name_of(2) / "optimizer.safetensors", tmp_path)
    loaded = manager.restore("best")

    assert loaded.manifest.step == 1
    assert [rejection.name for rejection in loaded.rejected] == [name_of(2)]
    assert manager.best_record().step == 1


@pytest.mark.parametrize("form", [str, Path, lambda path: path.name], ids=["str", "path", "name"])
def test_named_checkpoint_is_loaded(run, form):
    assert CheckpointManager(run).restore(form(run / name_of(1))).manifest.step == 1


def test_named_checkpoint_that_is_broken_is_an_error_and_stays(run):
    halve(run / name_of(3) / "model.safetensors", run)

    with pytest.raises(CheckpointCorruptError, match=r"step00000003 can't be used: model\.safetensors has"):
        CheckpointManager(run).restore(run / name_of(3))

    assert on_disk(run) == [name_of(1), name_of(2), name_of(3)]


def test_other_runs_newest_whole_one_is_loaded_and_nothing_there_is_renamed(run, tmp_path):
    halve(run / name_of(3) / "model.safetensors", run)

    loaded = CheckpointManager(tmp_path / "other").restore(run)

    assert loaded.manifest.step == 2
    assert loaded.record.uri == str(run / name_of(2))
    assert [rejection.name for rejection in loaded.rejected] == [name_of(3)]
    assert on_disk(run) == [name_of(1), name_of(2), name_of(3)]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [name_of(9), "nothing"])
def test_named_place_without_checkpoint_is_not_found(run, name):
    with pytest.raises(CheckpointNotFoundError):
        CheckpointManager(run).restore(run / name)


def test_rejections_in_another_run_do_not_hide_checkpoints_of_this_one(run, tmp_path):
    manager = CheckpointManager(tmp_path / "other")
    commit(manager, 3)
    halve(run / name_of(3) / "model.safetensors", run)

    manager.restore(run)

    assert [record.step for record in manager.records()] == [3]


def test_rank_that_did_not_exist_at_the_save_has_no_state_and_one_without_any_has_an_empty_one(run):
    manager = CheckpointManager(run)
    manager.commit({}, {}, CheckpointMeta(epoch=0, step=4))
    newest, before = Storage.open(run / name_of(4)), Storage.open(run / name_of(3))

    assert load(newest, rank=0).rank_state == {}
    assert load(newest, rank=1).rank_state is None
    assert load(before, rank=0).rank_state["loader"]["position"] == 3
    assert load(before, rank=1).rank_state is None


def make_newer(directory):
    """As a later version would write it: an unknown form, but the same seal."""
    path = directory / "manifest.json"
    document = json.loads(path.read_bytes())
    newer = {
        "format_version": 2,
        "versions": {"ray_trainer": "7.3.0"},
        "shape": "unknown",
        "xxh3_128": "0" * 32,
    }
    assert document["format_version"] == 1
    path.write_bytes(manifest_module._sealed(json.dumps(newer).encode()))


def test_newer_format_is_refused_with_the_version_it_needs_and_left_alone(run):
    make_newer(run / name_of(3))
    manager = CheckpointManager(run, keep_last_n=1, keep_best_k=0)

    for which in ("auto", "newest", "best", name_of(3)):
        with pytest.raises(NewerFormatError, match=r"format_version 2.*ray_trainer 7\.3\.0"):
            manager.restore(which)
    with pytest.raises(NewerFormatError):
        verify(run, name_of(3))
    assert manager.clean_leftovers() == []
    assert commit(manager, 3).name == f"{name_of(3)}_2"
    assert on_disk(run) == [name_of(3), f"{name_of(3)}_2"]


class Unreadable(Storage):
    """Storage that fails to deliver one checkpoint for the moment."""

    def blocks(self, name, block_bytes=1 << 20):
        if self.path.endswith(name_of(3)) and name == "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{self.path}/{name}")
        return super().blocks(name, block_bytes)


def test_checkpoint_that_cannot_be_read_now_is_passed_over_but_not_called_broken(run):
    loaded = CheckpointManager(Unreadable.open(run)).restore()

    assert loaded.manifest.step == 2
    assert "Input/output error" in loaded.rejected[0].reason
    assert on_disk(run) == [name_of(1), name_of(2), name_of(3)]
    assert CheckpointManager(run).restore().manifest.step == 3


class ReadOnly(Storage):
    def move(self, name, new_name):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{self.path}/{name}")


def test_broken_checkpoint_on_read_only_storage_is_passed_over_and_never_counted(run):
    zero(run / name_of(3) / "model.safetensors", run)
    manager = CheckpointManager(ReadOnly.open(run))

    loaded = manager.restore()

    assert loaded.manifest.step == 2
    assert [record.step for record in manager.records()] == [1, 2]
    assert on_disk(run) == [name_of(1), name_of(2), name_of(3)]


def test_broken_checkpoint_on_an_object_store_is_set_aside(tmp_path):
    storage = Storage.open(f"memory://{tmp_path.name}/run")
    manager = CheckpointManager(storage)
    for step in (1, 2):
        commit(manager, step)
    storage.child(name_of(2)).write("trainer.json", b"{}")

    assert manager.restore().manifest.step == 1
    assert storage.list() == [name_of(1), f"{name_of(2)}.broken"]
    assert storage.child(f"{name_of(2)}.broken").read("reason.txt").startswith(b"trainer.json")


def test_names_in_a_forged_manifest_cannot_leave_the_directory(run):
    path = run / name_of(3) / "manifest.json"
    text = path.read_bytes().replace(b'"trainer.json"', b'"../../../etc"')
    path.write_bytes(manifest_module._sealed(text))

    assert any("etc" in problem for problem in verify(run, name_of(3)))
    assert CheckpointManager(run).restore().manifest.step == 2


# Kill -9 of a real process


def save_for_ever(run, report, prepare):
    """The child: commits step after step and says so, until it is killed."""
    torch.set_num_threads(1)
    manager = CheckpointManager(run, keep_last_n=2, keep_best_k=0)
    prepare()
    for step in range(1, 1000):
        commit(manager, step)
        os.write(report, step.to_bytes(4, "little"))


def run_and_kill(run, prepare=lambda: None, after_s=None):
    """Fork the child, kill it after a while or let it kill itself; returns the last step it had committed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            save_for_ever(run, writing, prepare)
        finally:
            os._exit(1)
    os.close(writing)
    if after_s is not None:
        os.read(reading, 4)  # the first is done: from here on the moment counts
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL  # the fault fired
    with os.fdopen(reading, "rb") as pipe:
        steps = pipe.read()
    return int.from_bytes(steps[-4:], "little")


def die_at(operation):
    """Kill this process at the n-th call that changes something on the disk."""
    left = operation

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for owner, name in (
        *((os, name) for name in ("fsync", "mkdir", "unlink", "rmdir")),
        *((Path, name) for name in ("replace", "unlink", "mkdir")),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def assert_usable(run, committed):
    """What is listed is whole, nothing that was committed is lost, and the run goes on."""
    for record in list_checkpoints(run):
        assert verify(run, record.name) == []
    manager = CheckpointManager(run, keep_last_n=2, keep_best_k=0)
    manager.clean_leftovers()
    loaded = manager.restore("auto")
    step = loaded.manifest.step if loaded else 0
    assert committed <= step <= committed + 1
    if loaded:
        expected = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        assert torch.equal(loaded.state["model"]["weight"], expected)
    commit(manager, step + 1)
    assert manager.restore().manifest.step == step + 1
    assert set(on_disk(run)) == {record.name for record in list_checkpoints(run)}


def test_killed_at_any_change_on_disk_leaves_whole_checkpoints_only(tmp_path):
    in_one_save = 7 * 3 + 2 + 2  # each file is synced, renamed and its directory synced; then retention
    for operation in range(0, in_one_save * 4, 3):
        run = tmp_path / str(operation)

        committed = run_and_kill(run, prepare=lambda operation=operation: die_at(operation))

        assert_usable(run, committed)


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment_leaves_whole_checkpoints_only(tmp_path, seed):
    run = tmp_path / "run"

    committed = run_and_kill(run, after_s=random.Random(seed).uniform(0, 0.08))

    assert_usable(run, committed + 1 if committed == 0 else committed)


def test_errors_survive_pickling():
    for kind in (NewerFormatError, CheckpointCorruptError, CheckpointError, CheckpointNotFoundError):
        error = pickle.loads(pickle.dumps(kind("why")))
        assert type(error) is kind
        assert str(error) == "why"
