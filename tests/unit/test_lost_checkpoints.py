"""A run that has saved and has lost what it saved is not started from scratch in silence, and nothing of it is touched.

What was saved is known from the events, which outlive the checkpoints.
"""

import json
import shutil
from pathlib import Path

import pytest
from experiments import assert_same, checkpoints, events, everything_in, metric_rows, run

from ray_trainer.checkpoint import CheckpointManager
from ray_trainer.errors import CheckpointCorruptError, CheckpointError
from ray_trainer.metrics import EventLog, saved_checkpoints
from ray_trainer.storage import Storage
from ray_trainer.storage.sealing import OBSOLETE, discard

SHORT = {"epochs": 1, "save_every_n_steps": 2}


def lose_manifests(run_dir: Path) -> None:
    for manifest in run_dir.glob("checkpoint_*/manifest.json"):
        manifest.unlink()


def lose_directories(run_dir: Path) -> None:
    for checkpoint in run_dir.glob("checkpoint_*"):
        shutil.rmtree(checkpoint)


def lose_one_and_tear_the_others(run_dir: Path) -> None:
    first, *others = sorted(run_dir.glob("checkpoint_*"))
    shutil.rmtree(first)
    for checkpoint in others:
        model = checkpoint / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-1])


LOSSES = [lose_manifests, lose_directories, lose_one_and_tear_the_others]


def contents(directory: Path) -> dict[Path, bytes]:
    """All files of a run but those that say who is at work on it."""
    return {path: (directory / path).read_bytes() for path in everything_in(directory) if (directory / path).is_file()}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_run_that_lost_all_it_saved_is_refused_untouched_and_goes_on_once_the_files_are_back(tmp_path, lose):
    run(tmp_path / "run", **SHORT)
    newest = checkpoints(tmp_path / "run")[-1]
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    lose(tmp_path / "run")
    before = contents(tmp_path / "run")

    for _ in range(2):
        with pytest.raises(CheckpointCorruptError) as refused:
            run(tmp_path / "run", epochs=2, save_every_n_steps=2)
        assert [
            word for word in (newest, "no file was", "backup", "resume_from=None") if word not in str(refused.value)
        ] == []
        assert contents(tmp_path / "run") == before
    for name in checkpoints(tmp_path / "backup"):
        shutil.copytree(tmp_path / "backup" / name, tmp_path / "run" / name, dirs_exist_ok=True)

    assert_same(run(tmp_path / "run", **SHORT), run(tmp_path / "whole", **SHORT))
    assert events(tmp_path / "run", "resumed")[0]["from"] == newest
    assert events(tmp_path / "run", "checkpoint_rejected") == []


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_run_that_lost_all_it_saved_starts_again_on_purpose_and_keeps_what_was_left(tmp_path, lose):
    run_dir = tmp_path / "run"
    run(run_dir, **SHORT)
    lose(run_dir)
    left = contents(run_dir)

    again = run(run_dir, None, **SHORT)

    assert contents(run_dir / "previous_01") == left
    assert_same(run(run_dir, **SHORT), again)  # 'auto' goes on with the new run
    assert_same(again, run(tmp_path / "whole", **SHORT))


def test_newest_that_lost_its_manifest_gives_way_to_the_one_before_and_is_kept(tmp_path):
    run_dir = tmp_path / "run"
    run(run_dir, **SHORT)
    newest = checkpoints(run_dir)[-1]
    (run_dir / newest / "manifest.json").unlink()
    left = contents(run_dir / newest)

    resumed = run(run_dir, **SHORT)

    assert_same(resumed, run(tmp_path / "whole", **SHORT))
    (rejected,) = events(run_dir, "checkpoint_rejected")
    assert (rejected["checkpoint"], "although the save was finished" in rejected["reason"]) == (newest, True)
    aside = contents(run_dir / f"{newest}.broken")
    assert {path: content for path, content in aside.items() if path.name != "reason.txt"} == left


def test_run_without_a_finished_save_starts_anew_and_clears_the_rest_of_one(tmp_path):
    run_dir = tmp_path / "run"
    unfinished = run_dir / "checkpoint_epoch0000_step00000001"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    EventLog(Storage.open(run_dir), attempt=1).record("run_started", step=0, epoch=0)

    assert_same(run(run_dir, **SHORT), run(tmp_path / "whole", **SHORT))
    assert not unfinished.exists()


def test_copy_of_a_run_goes_on_as_the_run_itself(tmp_path):
    run(tmp_path / "run", **SHORT)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")

    assert_same(run(tmp_path / "copy", epochs=2), run(tmp_path / "run", epochs=2))


def test_checkpoint_that_was_being_deleted_is_a_leftover_and_one_that_lost_its_manifest_is_not(tmp_path):
    class Dies(Storage):
        def delete(self, name=""):
            if name:
                raise KeyboardInterrupt

    run(tmp_path, **SHORT)
    let_go, lost, kept = checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        discard(Dies.open(tmp_path), let_go, "manifest.json")
    assert (tmp_path / let_go / OBSOLETE).exists()
    (tmp_path / lost / "manifest.json").unlink()
    saved = saved_checkpoints(Storage.open(tmp_path))
    assert saved == [let_go, lost, kept]

    assert CheckpointManager(tmp_path).clean_leftovers(lambda: saved) == [let_go]
    assert checkpoints(tmp_path) == [lost, kept]


def test_checkpoint_that_can_not_be_read_at_the_moment_is_no_loss_for_good(tmp_path):
    class Unreadable(Storage):
        def blocks(self, name, block_bytes=1):
            if name == "model.safetensors":
                raise OSError(5, "Input/output error")
            return super().blocks(name, block_bytes)

    run(tmp_path, **SHORT)
    names = checkpoints(tmp_path)
    (tmp_path / names[0] / "trainer.json").write_bytes(b"{}")

    with pytest.raises(CheckpointError, match="Input/output error") as failed:
        CheckpointManager(Unreadable.open(tmp_path)).restore("auto", saved=lambda: names)

    assert type(failed.value) is CheckpointError
    assert checkpoints(tmp_path) == names


def test_checkpoints_after_the_point_that_a_run_went_back_to_are_not_expected(tmp_path):
    storage = Storage.open(tmp_path)
    log = EventLog(storage, attempt=1, clock=lambda: 50.0)
    for step in (2, 4, 6, 8):
        log.record("checkpoint_saved", step, checkpoint=f"at {step}")
    log.record("rolled_back", 9, to_step=7, tier="storage")
    assert saved_checkpoints(storage) == ["at 2", "at 4", "at 6"]
    log.record("rolled_back", 7, to_step=3, tier="memory")  # moves nothing

    late = EventLog(storage, attempt=2, clock=lambda: 1.0)  # on a host whose clock is behind
    late.record("resumed", 4, tier="storage")
    assert saved_checkpoints(storage) == ["at 2", "at 4"]
    late.record("took_over", 20)
    assert saved_checkpoints(storage) == []
    late.record("checkpoint_saved", 21, checkpoint="at 21")
    assert saved_checkpoints(storage) == ["at 21"]


def test_loss_is_noticed_with_torn_and_foreign_lines_in_the_events(tmp_path):
    run(tmp_path, **SHORT)
    lose_directories(tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "checkpoint_saved", "time": 1.0}) + "\n{")
    rows = metric_rows(tmp_path)

    with pytest.raises(CheckpointCorruptError, match="is gone"):
        run(tmp_path, **SHORT)

    assert metric_rows(tmp_path) == rows
