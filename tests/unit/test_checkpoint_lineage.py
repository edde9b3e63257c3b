"""Which checkpoints count in a run that has changed hands."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, list_checkpoints
from ray_trainer.checkpoint.catalog import checkpoint_names
from ray_trainer.checkpoint.layout import read_manifest
from ray_trainer.checkpoint.lineage import inherit
from ray_trainer.checkpoint.manifest import MANIFEST, Manifest
from ray_trainer.errors import CheckpointCorruptError, LeaseLostError
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import follow, holding


class Owner:
    """Somebody who trains: holds the run, takes over what is there, saves."""

    def __init__(self, run, fence):
        self.epoch = fence.epoch
        self.manager = CheckpointManager(run.fenced(fence), keep_last_n=50)
        inherit(self.manager.storage, checkpoint_names(run))

    def save(self, step):
        """Returns the name."""
        state = {"model": {"weight": torch.full((4,), float(step))}, "progress": {"step": step}}
        return self.manager.commit(state, {}, CheckpointMeta(epoch=0, step=step)).name


@pytest.fixture
def run(tmp_path):
    return Storage.open(tmp_path / "run")


@pytest.fixture
def owners(run):
    """A new owner at each call, who takes the run over."""
    with ExitStack() as stack:
        yield lambda: Owner(run, stack.enter_context(holding(run, take_over=True)).fence)


def finish_too_late(run, tmp_path, step, epoch):
    """Write a checkpoint of an earlier epoch, as a process does that was paused right before its manifest."""
    elsewhere = CheckpointManager(tmp_path / f"elsewhere{step}")
    state = {"model": {"weight": torch.zeros(4)}, "progress": {"step": step}}
    name = elsewhere.commit(state, {}, CheckpointMeta(epoch=0, step=step)).name
    place = elsewhere.storage.child(name)
    manifest = replace(read_manifest(place), fencing_epoch=epoch)
    place.write(MANIFEST, manifest.to_bytes())
    place.local_path().rename(run.local_path(name))
    return name


def names(run):
    return [record.name for record in list_checkpoints(run)]


def test_manifest_carries_the_epoch_and_earlier_ones_had_none(run, owners):
    owner = owners()
    owner.save(1)
    owner = owners()

    manifest = read_manifest(run.child(owner.save(2)))

    assert manifest.fencing_epoch == owner.epoch == 2
    text = manifest.to_bytes().replace(b' "fencing_epoch": 2,\n', b"")
    assert b"fencing" not in text
    assert Manifest.from_bytes(resealed(text)).fencing_epoch == 0


def resealed(text):
    from ray_trainer.checkpoint.manifest import _sealed

    return _sealed(text)


def test_checkpoint_of_who_lost_the_run_is_set_aside_and_the_one_before_is_used(run, tmp_path, owners):
    first = owners()
    kept = first.save(1)
    owners()
    stray = finish_too_late(run, tmp_path, 9, first.epoch)

    assert names(run) == [kept]
    loaded = owners().manager.restore("auto")

    assert loaded.record.name == kept
    assert [rejection.name for rejection in loaded.rejected] == [stray]
    assert "lost the run" in run.child(f"{stray}.stray").read("reason.txt").decode()


def test_stray_checkpoint_that_was_told_of_is_no_loss(run, tmp_path, owners):
    first = owners()
    owners()
    stray = finish_too_late(run, tmp_path, 9, first.epoch)

    for _ in range(2):
        assert owners().manager.restore("auto", saved=lambda: [stray]) is None
    assert run.exists(f"{stray}.stray")
    assert owners().save(9) == stray
    assert owners().manager.restore("auto", saved=lambda: [stray]).record.name == stray


def test_stray_checkpoint_between_good_ones_is_never_listed_nor_best(run, tmp_path, owners):
    first = owners()
    before = first.save(1)
    second = owners()
    after = second.save(9)
    finish_too_late(run, tmp_path, 5, first.epoch)

    assert names(run) == [before, after]
    assert owners().manager.restore("auto").record.name == after


def test_checkpoint_that_was_unfinished_at_the_take_over_does_not_count_when_it_is_finished(run, tmp_path, owners):
    first = owners()
    late = finish_too_late(run, tmp_path, 3, first.epoch)
    manifest = run.child(late).read(MANIFEST)
    run.child(late).delete(MANIFEST)
    owners()
    run.child(late).write(MANIFEST, manifest)

    assert names(run) == []
    assert owners().manager.restore("auto") is None


def test_checkpoints_count_through_any_number_of_owners(run, owners):
    saved = []
    for step in range(1, 6):
        saved.append(owners().save(step))

    assert names(run) == saved
    assert owners().manager.restore("auto").record.name == saved[-1]


def test_run_without_a_lease_is_taken_over_with_all_it_has(run, owners):
    manager = CheckpointManager(run)
    state = {"model": {"weight": torch.zeros(4)}}
    saved = manager.commit(state, {}, CheckpointMeta(epoch=0, step=4)).name

    assert owners().manager.restore("auto").record.name == saved


def test_workers_of_an_earlier_start_can_not_commit_and_leave_nothing(run):
    with holding(run) as lease:
        first = Owner(run, follow(run, lease.number))
        first.save(1)
        second = Owner(run, follow(run, lease.number))

        with pytest.raises(LeaseLostError, match="started again"):
            first.save(2)
        second.save(2)
        third = Owner(run, follow(run, lease.number))
        third.save(3)

    assert [record.step for record in list_checkpoints(run)] == [1, 2, 3]


@pytest.mark.parametrize(("data", "why"), [(b"", "it is empty"), (b"{}", "it has no checksum")])
def test_manifest_that_is_none_is_told_in_words(data, why):
    with pytest.raises(CheckpointCorruptError, match=f"manifest.json is broken: {why}"):
        Manifest.from_bytes(data)
