"""Three processes over gloo: one dies, and the two others find out, give up their group and agree on a state."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exit_codes
from torch import distributed as dist
from torch import nn

from ray_trainer import distributed
from ray_trainer.checkpoint import Carried, CheckpointManager, CheckpointMeta, SurvivorTier
from ray_trainer.cluster.connections import connections_between_ranks, hang_up, open_connections
from ray_trainer.storage.snapshots import ProcessMemory

CARRIED = Carried(rows=(), saved_step=-1, saved_at_s=0.0, owes_save=False)


def lose_rank_1(run_dir: Path) -> Any:
    """Rank 0 trains with it, rank 2 waits for rank 0; returns what the survivors saw, and have afterwards."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    before = open_connections()
    meeting = dist.FileStore(str(run_dir) + ".meeting", 3)  # at the old address somebody might meet the old store
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=3, timeout=timedelta(seconds=50))
    connections = connections_between_ranks(before)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    memory = ProcessMemory()
    step = 4 + rank  # as if rank 0 had not seen the end of the last exchange
    state = {"model": {"w": torch.full((3,), float(step))}, "hooks": {"of": rank}}
    SurvivorTier(memory).keep(
        state, {"hooks": {"of": rank}}, CheckpointMeta(0, step), CARRIED, CheckpointManager(run_dir)
    )
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began_s = time.monotonic()
    try:
        if rank == 0:
            model(torch.ones(1, 2)).sum().backward()
        else:
            dist.recv(torch.zeros(1), src=0)
    except RuntimeError as error:
        lost = distributed.has_lost_peer(error)
    seconds = time.monotonic() - began_s
    hang_up(connections)
    dist.destroy_process_group()

    store = dist.FileStore(str(run_dir) + ".store", 2)
    dist.init_process_group("gloo", store=store, rank=rank // 2, world_size=2, timeout=timedelta(seconds=30))
    loaded = SurvivorTier(memory).restore()
    assert loaded is not None
    return lost, seconds < 40, loaded.record.step, loaded.state["model"]["w"].tolist(), loaded.rank_state


@pytest.mark.timeout(120)
def test_survivors_let_each_other_know_and_take_the_state_of_who_has_most_steps(tmp_path: Path) -> None:
    assert exit_codes(3, lose_rank_1, tmp_path / "run") == [0, -signal.SIGKILL, 0]

    first, last = (torch.load(tmp_path / f"run-{rank}.pt", weights_only=False) for rank in (0, 2))

    assert first == (True, True, 6, [6.0] * 3, None)  # what is its own is of an earlier step
    assert last == (True, True, 6, [6.0] * 3, {"hooks": {"of": 2}})
