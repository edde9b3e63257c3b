"""What Ray Train keeps of its own in a run's directory can neither end a run nor keep it from starting again.

Each hole is shown with Ray's own classes on a plain file system first; no cluster is needed for that.
"""

import asyncio
import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from faulty_files import FaultyFiles
from pyarrow import fs as pafs
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager as RaysManager
from ray.train.v2._internal.execution.context import StorageContext, is_managed_checkpoint
from ray.train.v2._internal.execution.training_report import _TrainingReport

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, list_checkpoints
from ray_trainer.cluster.storage import SNAPSHOT, filesystem_for_ray, mirror, storage_of
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding
from ray_trainer.storage.patience import Patience

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def files(tmp_path: Path) -> FaultyFiles:
    return FaultyFiles(tmp_path)


@pytest.fixture
def run(files: FaultyFiles) -> Storage:
    """With checkpoints of the steps 1 and 2."""
    run = files.storage("storage/run").with_patience(Patience(limit_s=0.5, first_s=0.001))
    for step in (1, 2):
        save(run, step)
    return run


def save(run: Storage, step: int) -> None:
    meta = CheckpointMeta(epoch=0, step=step, metrics={"val_loss": 1 / step, "odd": float("nan")})
    CheckpointManager(run).commit({"model": {"weight": torch.zeros(2)}}, {}, meta)


def context(filesystem: pafs.FileSystem) -> StorageContext:
    return StorageContext("storage", "run", storage_filesystem=filesystem)


def report(storage: StorageContext, step: int) -> None:
    """What Ray's controller does when workers report a checkpoint."""
    path = storage.build_checkpoint_path_from_name(f"checkpoint_epoch0000_step{step:08d}")
    checkpoint = Checkpoint(path=path, filesystem=storage.storage_filesystem)

    async def register() -> None:
        manager = RaysManager(CheckpointConfig(), storage)
        manager.register_checkpoint(_TrainingReport(checkpoint=checkpoint, metrics={"loss": 1.0}, validation=False))

    asyncio.run(register())


def names_that_ray_sees(storage: StorageContext) -> list[str]:
    results = RaysManager(CheckpointConfig(), storage).best_checkpoint_results
    return [Path(result.checkpoint.path).name for result in results]


def no_space(operation: str, path: str) -> OSError | None:
    is_list = operation == "write" and path.endswith(SNAPSHOT)
    return OSError(errno.ENOSPC, "No space left on device") if is_list else None


def once(number: int) -> Callable[[FaultyFiles], None]:
    return lambda files: files.fail("write", number, name=SNAPSHOT)


def always(files: FaultyFiles) -> None:
    files.fault = no_space


@pytest.mark.parametrize("let_fail", [once(errno.EIO), always], ids=["one I/O error", "no space"])
def test_list_that_can_not_be_written_ends_no_run(files, run, let_fail, caplog):
    plain = context(run.filesystem)
    let_fail(files)
    with pytest.raises(OSError, match=r"Input/output|No space"):
        report(plain, 1)

    ours = context(filesystem_for_ray(run))
    let_fail(files)
    report(ours, 1)

    assert files.failures >= 2


def test_list_is_written_whole_or_not_at_all(files, run):
    ours = context(filesystem_for_ray(run))
    report(ours, 1)
    before = run.read(SNAPSHOT)
    always(files)

    report(ours, 2)

    assert run.read(SNAPSHOT) == before


@pytest.mark.parametrize("damage", ["torn", "empty", "missing checkpoint", "another Ray"])
def test_list_that_ray_would_die_of_is_rebuilt_before_it_starts(run, files, tmp_path, damage):
    plain, ours = context(run.filesystem), context(filesystem_for_ray(run))
    report(plain, 1)
    listed = run.read(SNAPSHOT)
    if damage == "torn":
        run.write(SNAPSHOT, listed[:-7])
    elif damage == "empty":
        run.write(SNAPSHOT, b"")
    elif damage == "another Ray":
        run.write(SNAPSHOT, json.dumps({"ray_version": "2.0.0"}).encode())
    else:
        shutil.rmtree(tmp_path / "storage/run/checkpoint_epoch0000_step00000001")
    with pytest.raises(CheckpointManagerInitializationError):
        names_that_ray_sees(plain)

    left = run.read(SNAPSHOT)

    mirror(run, list_checkpoints(run))

    assert names_that_ray_sees(ours) == [record.name for record in list_checkpoints(run)]
    assert "checkpoint_epoch0000_step00000002" in names_that_ray_sees(ours)
    if damage in ("torn", "empty"):
        assert run.read(f"{SNAPSHOT}.broken") == left


def test_list_names_what_the_manifests_say_and_rays_own_result_opens_the_run(run):
    mirror(run, list_checkpoints(run))

    result = ray.train.Result.from_path(run.path, storage_filesystem=run.filesystem)

    assert result.checkpoint is not None
    assert result.checkpoint.path.endswith("step00000002")
    assert result.metrics == {"val_loss": 0.5}
    assert [metrics["val_loss"] for _, metrics in result.best_checkpoints] == [1.0, 0.5]


def test_list_that_this_ray_does_not_read_is_removed(run, monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.0.0")
    monkeypatch.setattr("ray_trainer.cluster.storage._snapshot", lambda records: {"of": "another Ray"})

    mirror(run, list_checkpoints(run))

    assert not run.exists(SNAPSHOT)


def test_renewing_the_list_is_not_told_to_the_user(run, capfd):
    mirror(run, list_checkpoints(run))

    assert capfd.readouterr() == ("", "")


def test_run_without_checkpoints_has_no_list_and_keeps_the_last_one_that_there_was(run):
    for content in (b"torn", b"{}"):
        run.write(SNAPSHOT, content)

        mirror(run, [])

        assert not run.exists(SNAPSHOT)
        assert run.read(f"{SNAPSHOT}.broken") == content


def test_reading_and_listing_are_tried_again(files, run):
    ours = filesystem_for_ray(run)
    for operation, act in (
        ("info", lambda: ours.get_file_info("storage/run").type),
        ("list", lambda: len(ours.get_file_info(pafs.FileSelector("storage/run")))),
        ("open", lambda: ours.open_input_stream(f"storage/run/{list_checkpoints(run)[0].name}/manifest.json").read()),
    ):
        expected: Any = act()
        files.fail(operation, errno.EIO)
        assert act() == expected
    assert files.failures == 3


def test_driver_that_was_taken_over_changes_nothing_through_ray(run, monkeypatch):
    monkeypatch.setattr("ray_trainer.storage.exclusive.SETTLE_S", 0.02)
    with holding(run) as old:
        ours = context(filesystem_for_ray(run.fenced(old.fence)))
        report(ours, 1)
        before = run.read(SNAPSHOT)
        with holding(run, take_over=True):
            report(ours, 2)
            with pytest.raises(Exception, match="taken over"):
                ours.storage_filesystem.delete_dir(f"{run.path}/{list_checkpoints(run)[0].name}")

        assert run.read(SNAPSHOT) == before
        assert [record.step for record in list_checkpoints(run)] == [1, 2]


def test_file_system_is_equal_to_its_copy_and_rays_context_takes_our_checkpoints_for_its_own(tmp_path):
    run = Storage.open(tmp_path / "run")
    ours = filesystem_for_ray(run)
    copy = pickle.loads(pickle.dumps(ours))

    assert copy == ours
    assert filesystem_for_ray(Storage.open(tmp_path / "other")) != ours
    assert ours != run.filesystem
    storage = StorageContext(str(tmp_path), "run", storage_filesystem=ours)
    assert is_managed_checkpoint(storage, Checkpoint(str(tmp_path / "run" / "checkpoint"), filesystem=copy))
    assert storage_of(copy, str(tmp_path / "run")).uri == run.uri
    assert storage_of(copy, str(tmp_path / "run")).is_local


def test_name_of_the_list_is_rays():
    assert SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
