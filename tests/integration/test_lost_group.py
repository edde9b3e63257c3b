"""A worker whose process group Ray has left, in another thread and before it ends it, does nothing alone."""

import json
from pathlib import Path
from threading import Thread

import pytest
from experiments import metric_rows, prepare
from ranks import on_ranks
from torch import distributed as dist

from ray_trainer.checkpoint import list_checkpoints

STEPS_AN_EPOCH = 3  # 19 samples, 8 a step on two ranks


def leave() -> None:
    if dist.is_initialized():
        thread = Thread(target=dist.destroy_process_group)
        thread.start()
        thread.join()


def train(run_dir: Path, moment: str) -> tuple[str, int]:
    """What this rank ended with, and the last step that it has completed."""
    prepared = prepare(run_dir, epochs=3, save_every_n_steps=1)
    if moment == "in the first validation":
        prepared.val_set.on_read = lambda index: leave() if prepared.trainer.progress.step else None
    else:
        prepared.diary.on_call = lambda name, count: leave() if (name, count) == (moment, 1) else None
    try:
        prepared.trainer.train(prepared.train_set, prepared.val_set)
    except RuntimeError as error:
        return str(error), prepared.trainer.progress.step
    return "nothing", prepared.trainer.progress.step


def world_size(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "manifest.json").read_text())["world_size"])


@pytest.mark.parametrize("moment", ["in the first validation", "on_validation_end", "on_epoch_end"])
def test_worker_whose_group_is_gone_neither_saves_nor_logs_what_it_has_alone(moment, tmp_path):
    run_dir = tmp_path / "run"

    ended = on_ranks(2, train, run_dir, moment)

    assert [step for _, step in ended] == [STEPS_AN_EPOCH, STEPS_AN_EPOCH]
    assert any("process group is gone" in error for error, _ in ended), ended
    assert all("nothing" not in error for error, _ in ended), ended
    saved = list_checkpoints(run_dir)
    assert {record.step for record in saved} <= {1, 2, 3}
    assert {world_size(run_dir / record.name) for record in saved} <= {2}
    if moment != "on_epoch_end":
        assert [row for row in metric_rows(run_dir) if row["split"] == "val"] == []
