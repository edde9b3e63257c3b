import errno
import json
import math
import os
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from torch import nn

from ray_trainer.checkpoint import (
    CheckpointManager,
    CheckpointMeta,
    export_weights,
    list_checkpoints,
    load_weights,
    verify,
)
from ray_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, ConfigError
from ray_trainer.storage import Storage


def state_of(step):
    return {
        "model": OrderedDict(weight=torch.full((3, 2), float(step)), bias=torch.zeros(2)),
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step))}},
            "param_groups": [{"betas": (0.9, 0.99)}],
        },
        "progress": {"step": step},
        "ema": {"weight": torch.full((3, 2), step / 2)},
    }


def commit(manager, step, epoch=0, **metrics):
    return manager.commit(state_of(step), {}, CheckpointMeta(epoch=epoch, step=step, metrics=metrics))


def names(manager):
    return [record.name for record in manager.records()]


def on_disk(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "run")


def test_commit_leaves_exactly_the_documented_files(manager, tmp_path):
    record = manager.commit(state_of(120), {"loader": {"position": torch.tensor(5)}}, CheckpointMeta(epoch=3, step=120))

    directory = tmp_path / "run" / "checkpoint_epoch0003_step00000120"
    assert record.name == directory.name
    assert record.uri == str(directory)
    assert on_disk(directory) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rank00000.json",
        "rank00000.safetensors",
        "trainer.json",
        "trainer.safetensors",
    ]
    assert on_disk(tmp_path / "run") == [directory.name]


def test_state_without_tensors_has_no_tensor_files(manager, tmp_path):
    record = manager.commit({"progress": {"step": 1}}, {}, CheckpointMeta(epoch=0, step=1))

    assert on_disk(record.uri) == ["manifest.json", "trainer.json"]
    assert manager.restore().state == {"progress": {"step": 1}}


def test_manifest_describes_every_file_and_the_run(manager):
    record = manager.commit(
        state_of(7),
        {},
        CheckpointMeta(
            epoch=1,
            step=7,
            metrics={"val_loss": np.float32(0.5), "bad": torch.tensor(float("nan"))},
            global_batch_size=64,
            config={"betas": (0.9, 0.999), "epochs": 3},
            data_fingerprint="abc",
            attempt=2,
        ),
    )

    text = (Path(record.uri) / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert manifest["format_version"] == 1
    assert (manifest["step"], manifest["epoch"], manifest["world_size"]) == (7, 1, 1)
    assert (manifest["global_batch_size"], manifest["data_fingerprint"], manifest["attempt"]) == (
        64,
        "abc",
        2,
    )
    assert (manifest["monitor"], manifest["mode"], manifest["monitor_value"]) == ("val_loss", "min", 0.5)
    assert manifest["versions"]["torch"] == torch.__version__
    for name, entry in manifest["files"].items():
        content = (Path(record.uri) / name).read_bytes()
        assert entry == {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    assert {*manifest["files"], "manifest.json"} == set(on_disk(record.uri))
    assert record.size_bytes == sum(entry["size"] for entry in manifest["files"].values())
    assert record.monitor_value == 0.5
    loaded = manager.restore().manifest
    assert loaded.config == {"betas": (0.9, 0.999), "epochs": 3}
    assert math.isnan(loaded.metrics["bad"])


def test_config_hash_depends_on_values_and_not_on_their_order(manager):
    hashes = []
    for step, config in enumerate([{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}]):
        manager.commit({}, {}, CheckpointMeta(epoch=0, step=step, config=config))
        hashes.append(manager.restore().manifest.config_hash)

    assert hashes[0] == hashes[1] != hashes[2]


def test_weights_load_with_safetensors_alone_under_the_models_own_names(manager):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    record = manager.commit({"model": model.state_dict()}, {}, CheckpointMeta(epoch=0, step=1))

    weights = safetensors.torch.load_file(Path(record.uri) / "model.safetensors")

    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_come_back_under_all_names(manager):
    model = Tied()
    state = {"copies": {"weight": model.embedding.weight}, "model": model.state_dict()}
    record = manager.commit(state, {}, CheckpointMeta(epoch=0, step=1))

    stored = safetensors.torch.load_file(Path(record.uri) / "model.safetensors")
    restored = manager.restore().state

    assert list(stored) == ["embedding.weight"]
    assert not (Path(record.uri) / "trainer.safetensors").exists()
    Tied().load_state_dict(restored["model"])
    assert torch.equal(restored["model"]["head.weight"], model.head.weight)
    assert torch.equal(restored["copies"]["weight"], model.head.weight)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(manager, tmp_path):
    state = state_of(1) | {"hooks": {"my_hook": {"callback": len}}}

    with pytest.raises(CheckpointError, match=r"hooks\.my_hook\.callback: builtin_function"):
        manager.commit(state, {}, CheckpointMeta(epoch=0, step=1))
    with pytest.raises(CheckpointError, match=r"rank00000\.loader: set"):
        manager.commit({}, {"loader": {1}}, CheckpointMeta(epoch=0, step=1))
    with pytest.raises(CheckpointError, match=r"metrics\.val_loss: str is not a number"):
        manager.commit({}, {}, CheckpointMeta(epoch=0, step=1, metrics={"val_loss": "0.5"}))
    with pytest.raises(CheckpointError, match=r"config\.path: \w*Path"):
        manager.commit({}, {}, CheckpointMeta(epoch=0, step=1, config={"path": tmp_path}))

    assert not (tmp_path / "run").exists()


def test_same_step_twice_gets_a_number_and_the_later_is_newest(manager):
    first = commit(manager, step=5, val_loss=1.0)
    second = manager.commit({"which": "second"}, {}, CheckpointMeta(epoch=0, step=5))
    third = manager.commit({"which": "third"}, {}, CheckpointMeta(epoch=0, step=5))

    base = "checkpoint_epoch0000_step00000005"
    assert [first.name, second.name, third.name] == [base, f"{base}_2", f"{base}_3"]
    assert manager.restore().state == {"which": "third"}


def test_leftover_of_a_broken_save_is_cleared_by_the_next_of_that_step(manager, tmp_path):
    leftover = tmp_path / "run" / "checkpoint_epoch0000_step00000005"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    (leftover / "rank00007.json").write_bytes(b"of another attempt")

    record = commit(manager, step=5)

    assert record.name == leftover.name
    assert not (leftover / "rank00007.json").exists()
    assert verify(tmp_path / "run", record.name) == []


def test_clean_leftovers_removes_unfinished_checkpoints_and_nothing_else(manager, tmp_path):
    whole = commit(manager, step=1)
    run = tmp_path / "run"
    unfinished = run / "checkpoint_epoch0000_step00000002"
    torn = run / "checkpoint_epoch0000_step00000003"
    for directory in (unfinished, torn, run / "mine", run / "checkpoint_of_my_own"):
        directory.mkdir()
    (torn / "manifest.json").write_bytes(b"{")
    (run / "run.yaml").write_text("a: 1")

    assert manager.clean_leftovers() == [unfinished.name]

    assert on_disk(run) == sorted([whole.name, torn.name, "mine", "checkpoint_of_my_own", "run.yaml"])


def test_newest_step_is_that_of_a_save_that_was_finished(manager, tmp_path):
    assert manager.newest_step() == -1
    commit(manager, step=4)
    (tmp_path / "run" / "checkpoint_epoch0000_step00000007").mkdir()  # else a snapshot of step 5 would not be used

    assert manager.newest_step() == 4


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last_n=2, keep_best_k=1)
    for step, loss in enumerate([0.5, 0.1, 0.4, 0.3, 0.2]):
        commit(manager, step=step, val_loss=loss)

    assert [record.step for record in manager.records()] == [1, 3, 4]
    assert on_disk(tmp_path) == names(manager)
    assert manager.get_best() == tmp_path / "checkpoint_epoch0000_step00000001"


def test_retention_agrees_with_a_brute_force_model_over_restarts(tmp_path):
    randomness = random.Random(0)
    for trial in range(10):
        last, best, mode = (
            randomness.randint(1, 3),
            randomness.randint(0, 3),
            randomness.choice(["min", "max"]),
        )
        alive: dict[int, float] = {}
        manager = None
        for step in range(12):
            if manager is None or randomness.random() < 0.3:
                manager = CheckpointManager(tmp_path / str(trial), best, last, "score", mode)
            score = randomness.choice([0.1, 0.2, 0.3, 0.4, math.nan, math.inf, None])
            manager.commit(
                {}, {}, CheckpointMeta(epoch=0, step=step, metrics={} if score is None else {"score": score})
            )
            alive[step] = math.nan if score is None else score
            comparable = sorted(
                (value if mode == "min" else -value, step) for step, value in alive.items() if math.isfinite(value)
            )
            kept = {step for _, step in comparable[:best]} | set(sorted(alive)[-last:])
            alive = {step: value for step, value in alive.items() if step in kept}
            assert [record.step for record in manager.records()] == sorted(alive)
            assert [record.step for record in list_checkpoints(tmp_path / str(trial))] == sorted(alive)


def test_nan_and_missing_are_never_best(manager):
    commit(manager, step=1, val_loss=float("nan"))
    commit(manager, step=2)
    assert manager.best_record() is None
    assert manager.get_best().name.endswith("step00000002")

    commit(manager, step=3, val_loss=2.0)
    commit(manager, step=4, val_loss=float("-inf"))

    assert manager.best_record().step == 3


def test_earlier_step_is_best_of_equals_and_its_latest_copy(manager):
    commit(manager, step=1, val_loss=1.0)
    copy = commit(manager, step=1, val_loss=1.0)
    commit(manager, step=2, val_loss=1.0)

    assert manager.best_record().name == copy.name


def test_redone_epoch_does_not_take_the_best_with_it(tmp_path):
    manager = CheckpointManager(tmp_path, keep_best_k=1, keep_last_n=1)
    commit(manager, step=30, epoch=3, val_loss=0.9)
    commit(CheckpointManager(tmp_path, keep_best_k=1, keep_last_n=1), step=30, epoch=3, val_loss=0.5)
    commit(manager, step=40, epoch=4, val_loss=0.7)

    assert on_disk(tmp_path) == ["checkpoint_epoch0003_step00000030_2", "checkpoint_epoch0004_step00000040"]


def test_checkpoint_just_committed_stays_even_behind_older_steps(tmp_path):
    commit(CheckpointManager(tmp_path), step=100)
    manager = CheckpointManager(tmp_path, keep_last_n=1, keep_best_k=0)

    commit(manager, step=50)

    assert [record.step for record in manager.records()] == [50, 100]


def test_keep_all_deletes_nothing(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last_n=None, keep_best_k=0)
    for step in range(8):
        commit(manager, step=step)

    assert len(manager.records()) == 8


@pytest.mark.parametrize("wrong", [{"keep_last_n": 0}, {"keep_best_k": -1}, {"mode": "best"}], ids=str)
def test_retention_out_of_range_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CheckpointManager(tmp_path, **wrong)


def test_construction_listing_and_loading_touch_neither_files_nor_random_state(manager, tmp_path):
    commit(manager, step=1, val_loss=1.0)
    (tmp_path / "run" / "checkpoint_epoch0000_step00000002").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    random_state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    reader = CheckpointManager(tmp_path / "run")
    reader.records()
    reader.load()
    reader.get_best()
    verify(tmp_path / "run", "checkpoint_epoch0000_step00000001")
    load_weights(tmp_path / "run")
    CheckpointManager(tmp_path / "nothing").records()

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]
    assert (np.random.get_state()[1] == random_state[2]).all()


class FullDisk(Storage):
    """A disk that has room for a number of writes and then is full, or another error."""

    room = math.inf
    error = errno.ENOSPC

    def write_chunks(self, name, chunks):
        if FullDisk.room <= 0:
            raise OSError(FullDisk.error, os.strerror(FullDisk.error), f"{self.path}/{name}")
        FullDisk.room -= 1
        super().write_chunks(name, chunks)


@pytest.fixture
def full_disk():
    FullDisk.room = math.inf
    yield FullDisk
    FullDisk.room = math.inf


@pytest.mark.parametrize("room", range(5))
def test_disk_that_fills_up_during_a_save_damages_nothing_good(tmp_path, full_disk, room):
    manager = CheckpointManager(full_disk.open(tmp_path), keep_last_n=1, keep_best_k=0)
    good = commit(manager, step=1)

    full_disk.room = room
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        commit(manager, step=2)

    assert str(tmp_path / "checkpoint_epoch0000_step00000002") in str(caught.value)
    assert on_disk(tmp_path) == [good.name]
    assert verify(tmp_path, good.name) == []
    full_disk.room = math.inf
    assert commit(manager, step=2).step == 2
    assert [record.step for record in manager.records()] == [2]


class NoDeleting(Storage):
    def delete(self, name=""):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{self.path}/{name}")


def test_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, caplog):
    manager = CheckpointManager(NoDeleting.open(tmp_path), keep_last_n=1, keep_best_k=0)
    commit(manager, step=1)

    commit(manager, step=2)

    assert [record.step for record in manager.records()] == [1, 2]
    assert "could not be deleted" in caplog.text


def test_retention_takes_the_manifest_first_and_last_what_tells_that_the_rest_was_let_go(tmp_path):
    changed = []

    class Recording(Storage):
        def delete(self, name=""):
            changed.append(f"{self.path}/{name}".removeprefix(f"{tmp_path}/"))
            super().delete(name)

        def move(self, name, new_name):
            changed.append(f"{self.path}/{name} {new_name}".removeprefix(f"{tmp_path}/"))
            super().move(name, new_name)

    manager = CheckpointManager(Recording.open(tmp_path), keep_last_n=1, keep_best_k=0)
    first = commit(manager, step=1)
    files = [f"{first.name}/{name}" for name in on_disk(tmp_path / first.name) if name != "manifest.json"]
    commit(manager, step=2)

    assert changed == [f"{first.name}/manifest.json obsolete.json", *files, first.name]


def test_object_store_works_like_a_disk(tmp_path):
    storage = Storage.open(f"memory://{tmp_path.name}/run")
    manager = CheckpointManager(storage, keep_last_n=2, keep_best_k=0)
    for step in (1, 2, 3):
        commit(manager, step=step)

    fresh = CheckpointManager(storage.uri)
    loaded = fresh.restore()

    assert [record.step for record in fresh.records()] == [2, 3]
    assert loaded.manifest.step == 3
    assert torch.equal(loaded.state["model"]["weight"], torch.full((3, 2), 3.0))
    assert verify(storage.uri, loaded.record.name) == []
    assert isinstance(fresh.get_best(), str)
    assert fresh.load(fresh.get_best())["global_step"] == 3


# The shape of the original's API


def trained():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


def test_saved_model_optimizer_and_scheduler_load_exactly(manager):
    model, optimizer, scheduler = trained()

    path = manager.save(
        model,
        optimizer,
        scheduler,
        epoch=2,
        metrics={"val_loss": 0.5},
        global_step=20,
        custom_state={"a": (1,)},
    )
    loaded = manager.load(path)

    assert path.exists()
    assert (loaded["epoch"], loaded["global_step"], loaded["metrics"]) == (2, 20, {"val_loss": 0.5})
    assert loaded["custom_state"] == {"a": (1,)}
    assert loaded["scheduler_state_dict"] == scheduler.state_dict()
    other_model, other_optimizer, other_scheduler = trained()
    other_model.load_state_dict(loaded["model_state_dict"])
    other_optimizer.load_state_dict(loaded["optimizer_state_dict"])
    other_scheduler.load_state_dict(loaded["scheduler_state_dict"])
    for a, b in zip(other_optimizer.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in b)
    assert torch.equal(other_model.weight, model.weight)


def test_load_takes_the_best_by_default(manager):
    model, optimizer, _ = trained()
    for epoch, loss in enumerate([0.5, 0.2, 0.9]):
        manager.save(model, optimizer, None, epoch, {"val_loss": loss})

    assert manager.load()["epoch"] == 1
    assert manager.load()["scheduler_state_dict"] is None
    assert manager.load()["global_step"] == 1
    assert [metadata.epoch for metadata in manager.list_checkpoints()] == [2, 1, 0]
    assert manager.list_checkpoints()[0].to_dict()["best_metric"] == 0.9
    assert json.loads(manager.list_checkpoints()[0].metrics) == {"val_loss": 0.9}


def test_save_without_the_monitored_metric_is_a_value_error(manager):
    with pytest.raises(ValueError, match="not found in metrics"):
        manager.save(*trained(), epoch=0, metrics={"loss": 1.0})


def test_load_without_checkpoints_is_file_not_found(manager, tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoints found"):
        manager.load()
    with pytest.raises(FileNotFoundError, match="Checkpoint not found"):
        manager.load(tmp_path / "run" / "checkpoint_epoch0000_step00000000")


def test_wrapped_model_is_saved_under_its_own_names(manager):
    model = nn.Linear(3, 2)
    wrapped = nn.DataParallel(torch.compile(model))

    manager.save(wrapped, None, None, epoch=0, metrics={"val_loss": 1.0})

    assert list(manager.load()["model_state_dict"]) == ["weight", "bias"]


# Weights without a trainer


def test_weights_are_those_of_the_best_or_the_newest(manager, tmp_path):
    commit(manager, step=1, val_loss=0.1)
    commit(manager, step=2, val_loss=0.2)

    assert load_weights(tmp_path / "run")["weight"][0, 0] == 1
    assert load_weights(tmp_path / "run", "newest")["weight"][0, 0] == 2
    assert load_weights(tmp_path / "run" / "checkpoint_epoch0000_step00000002")["weight"][0, 0] == 2


def test_weights_of_a_run_without_validation_are_the_newest(manager, tmp_path):
    commit(manager, step=1)
    commit(manager, step=2)

    assert load_weights(tmp_path / "run")["weight"][0, 0] == 2


def test_exported_weights_load_strictly_also_where_some_are_tied(manager, tmp_path):
    model = Tied()
    manager.commit({"model": model.state_dict()}, {}, CheckpointMeta(epoch=0, step=1))

    export_weights(tmp_path / "run", tmp_path / "out" / "model.safetensors")

    other = Tied()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(other.head.weight, model.head.weight)
    assert on_disk(tmp_path / "out") == ["model.safetensors"]


def test_weights_of_a_broken_or_missing_checkpoint_are_refused(manager, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="No checkpoints found"):
        load_weights(tmp_path / "run")
    record = commit(manager, step=1)
    path = Path(record.uri) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors was altered"):
        export_weights(tmp_path / "run", tmp_path / "model.safetensors")

    assert not (tmp_path / "model.safetensors").exists()
