"""A rank whose writer does not get on any more fails the save of all ranks, and the next one is whole."""

from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from stalling import stop_for_good

from ray_trainer import distributed
from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, verify
from ray_trainer.errors import CheckpointError

STALLED = 1


def save_while_a_writer_stands_still(run_dir: Path) -> dict[str, Any]:
    assert distributed.patience_s() == 1800.0
    distributed.set_patience(100.0)
    assert distributed.patience_s() == 100.0
    manager = CheckpointManager(run_dir)
    state = {"model": {"w": torch.ones(4_000_000)}}
    manager.finish(manager.begin(state, {}, CheckpointMeta(epoch=0, step=1)))
    process = manager._background._process
    assert process is not None
    if distributed.rank() == STALLED:
        stop_for_good(process)
    error = ""
    try:
        manager.finish(manager.begin(state, {}, CheckpointMeta(epoch=0, step=2)))
    except CheckpointError as raised:
        error = str(raised)
    record = manager.finish(manager.begin(state, {}, CheckpointMeta(epoch=0, step=3)))
    manager.close()
    return {"error": error, "name": record.name, "has_ended": process.has_ended()}


def test_save_of_all_ranks_fails_with_the_writer_of_one_that_stands_still_and_the_next_is_whole(tmp_path):
    answers = on_ranks(2, save_while_a_writer_stands_still, tmp_path / "run")

    assert answers[0]["error"] == answers[1]["error"]
    assert f"rank {STALLED}: Storage has taken nothing of a checkpoint for 50 s" in answers[0]["error"]
    assert answers[STALLED]["has_ended"]
    assert [path.name[-8:] for path in sorted((tmp_path / "run").glob("checkpoint_*"))] == ["00000001", "00000003"]
    assert verify(tmp_path / "run", answers[0]["name"]) == []
