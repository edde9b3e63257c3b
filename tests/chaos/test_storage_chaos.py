"""Storage fills up, fails for a while, is slow or vanishes in the middle of a run."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import POINTS, Network, Points, assert_same, settings
from torch import nn

from ray_trainer import Trainer
from ray_trainer.checkpoint import list_checkpoints, verify
from ray_trainer.errors import CheckpointError, LeaseHeldError
from ray_trainer.metrics.events import read_events
from ray_trainer.metrics.jsonl import read_rows
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

STEPS = 12
TIMES = ("time", "samples_per_s", "data_wait_s")


class Heavy(nn.Module):
    """A checkpoint of it takes 3 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.ballast = nn.Parameter(torch.zeros(250_000))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.network(features) + self.ballast[:3]


class At:
    """Does something after certain steps."""

    def __init__(self, actions: dict[int, Callable[[], Any]]) -> None:
        self._actions = actions
        self.done: list[int] = []

    def on_step_end(self, record: Any) -> None:
        if record.step in self._actions:
            self.done.append(record.step)
            self._actions[record.step]()


def train(run_dir: str | Path, actions: dict[int, Callable[[], Any]] | None = None, **changes: Any) -> SimpleNamespace:
    torch.manual_seed(7)
    model = Heavy()
    chosen = {"epochs": 100, "max_steps": STEPS, "save_every_n_steps": 1, "log_every_n_steps": 1, "keep_last_n": 2}
    config = settings(run_dir, **{**chosen, "keep_best_k": 0, **changes})
    hooks = At(actions or {})
    trainer = Trainer(model, SimpleNamespace(), config, POINTS, hooks)
    trainer.train(Points(19), resume_from="auto")
    return SimpleNamespace(weights=model.state_dict(), hooks=hooks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("undisturbed")).weights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 50 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"only root may mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    assert shutil.disk_usage(disk).free == 0


def events(run: Storage, name: str) -> list[dict[str, Any]]:
    return [row for row in read_events(run) if row["event"] == name]


def assert_whole(run: Storage) -> None:
    """All checkpoints verify, the last step is the newest, each row stands once."""
    records = list_checkpoints(run)
    assert records[-1].step == STEPS
    assert [problem for record in records for problem in verify(run, record.name)] == []
    rows = [(row["split"], row["step"]) for row in read_rows(run, "metrics.jsonl")]
    assert sorted(rows) == sorted(set(rows))
    assert {step for split, step in rows if split == "train"} == set(range(1, STEPS + 1))


def test_disk_that_fills_up_and_is_freed_does_not_touch_the_run(small_disk, undisturbed):
    run_dir = small_disk / "run"

    ended = train(run_dir, {4: lambda: fill(small_disk), 9: lambda: (small_disk / "filler").unlink()})

    run = Storage.open(run_dir)
    failures = events(run, "checkpoint_failed")
    assert {event["step"] for event in failures} >= {5, 6, 7}
    assert all(event["reason"].count("of 52 MB are free") == 1 for event in failures)
    assert_same(ended.weights, undisturbed)
    assert_whole(run)


def test_disk_that_stays_full_ends_the_run_with_advice_and_it_goes_on_when_there_is_room(small_disk, undisturbed):
    run_dir = small_disk / "run"

    with pytest.raises(CheckpointError, match=r"No space left on device .* keep fewer checkpoints"):
        train(run_dir, {4: lambda: fill(small_disk)})
    (small_disk / "filler").unlink()
    good = list_checkpoints(run_dir)
    ended = train(run_dir)

    assert good[-1].step in (3, 4)
    assert_same(ended.weights, undisturbed)
    assert_whole(Storage.open(run_dir))


def test_directory_that_vanishes_for_a_while_is_not_made_anew_and_the_run_goes_on(tmp_path, undisturbed):
    run_dir, away = tmp_path / "run", tmp_path / "unmounted"

    def come_back() -> None:
        assert not run_dir.exists()
        away.rename(run_dir)

    ended = train(run_dir, {4: lambda: run_dir.rename(away), 8: come_back})

    run = Storage.open(run_dir)
    assert any("vanished" in event["reason"] for event in events(run, "checkpoint_failed"))
    assert_same(ended.weights, undisturbed)
    assert_whole(run)


def test_object_store_that_fails_for_20_s_costs_time_and_nothing_else(s3_server, undisturbed):
    run = Storage.open(f"s3://{s3_server.new_bucket()}/run")

    ended = train(run.uri, {5: lambda: s3_server.refuse_for(20)}, save_every_n_steps=4, log_every_n_steps=4)

    assert len(s3_server.refused) > 3
    assert_same(ended.weights, undisturbed)
    assert list_checkpoints(run)[-1].step == STEPS
    assert [problem for record in list_checkpoints(run) for problem in verify(run, record.name)] == []


def test_rows_up_to_a_checkpoint_are_on_the_object_store_before_it(s3_server):
    run = Storage.open(f"s3://{s3_server.new_bucket()}/run")
    gaps: list[set[int]] = []

    def look() -> None:
        rows = {row["step"] for row in read_rows(run, "metrics.jsonl") if row["split"] == "train"}
        saved = [record.step for record in list_checkpoints(run)]
        gaps.append(set(range(1, max(saved, default=0) + 1)) - rows)

    train(run.uri, dict.fromkeys(range(5, STEPS), look), save_every_n_steps=2)

    assert gaps == [set()] * (STEPS - 5)


def test_object_store_that_takes_its_time_is_waited_for(s3_server, undisturbed):
    run = Storage.open(f"s3://{s3_server.new_bucket()}/run")

    def slow() -> None:
        s3_server.delay_s = 4.0  # more than pyarrow waits by itself

    ended = train(run.uri, {11: slow, 12: s3_server.recover}, save_every_n_steps=11, log_every_n_steps=12)

    assert_same(ended.weights, undisturbed)
    assert list_checkpoints(run)[-1].step == STEPS


def test_of_many_who_want_a_run_on_an_object_store_at_once_one_gets_it(s3_server):
    run = Storage.open(f"s3://{s3_server.new_bucket()}/run")
    outcomes: list[str] = []
    tried = threading.Barrier(4)

    def take() -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(holding(run))
                outcomes.append("got it")
            except LeaseHeldError:
                outcomes.append("refused")
            tried.wait()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["got it", "refused", "refused", "refused"]
    assert not run.exists()  # nothing but the lease was there


def test_bucket_that_is_missing_is_told_with_advice_before_anything_is_trained(s3_server):
    with pytest.raises(OSError, match="there is no such bucket; create it"):
        train("s3://no-such-bucket-here/run")


def test_directory_that_is_removed_for_good_ends_the_run_with_an_error(tmp_path):
    run_dir = tmp_path / "run"

    with pytest.raises(CheckpointError, match="vanished"):
        train(run_dir, {4: lambda: shutil.rmtree(run_dir)})
    assert not run_dir.exists()
