"""Two real processes over gloo, started once; each test looks at one thing that they did."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from ray_trainer.checkpoint import CheckpointManager, CheckpointMeta, list_checkpoints, load_weights, verify
from ray_trainer.errors import CheckpointCorruptError, CheckpointError
from ray_trainer.storage import Storage


class FailsOnOneRank(Storage):
    """Storage whose disk is full on one rank."""

    failing_rank = -1

    def write_chunks(self, name, chunks):
        if dist.get_rank() == self.failing_rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{self.path}/{name}")
        super().write_chunks(name, chunks)


class Losing(Storage):
    """Storage that takes rank 1's file and keeps nothing, as another node's own disk looks to rank 0."""

    def write_chunks(self, name, chunks):
        if dist.get_rank() == 0:
            super().write_chunks(name, chunks)


class Unreadable(Storage):
    """Storage whose list of names can't be understood by the one rank that asks for it."""

    def modified_ns(self):
        if self.path.endswith("run"):
            raise ValueError("Invalid URL in listing")
        return super().modified_ns()


def outcome_of(action):
    try:
        return action()
    except CheckpointError as error:
        return type(error), str(error)


def rank_state(rank):
    return {"position": rank, "seen": torch.full((2,), float(rank))}


def commit(manager, step, mine):
    return manager.commit({"progress": {"step": step}}, mine, CheckpointMeta(epoch=0, step=step))


def act(directory, rank):
    """What both ranks do, in the same order; returns what each saw."""
    seen = {}
    manager = CheckpointManager(directory, keep_last_n=2, keep_best_k=0)
    seen["first"] = commit(manager, 1, rank_state(rank)).name
    loaded = manager.restore("auto")
    seen["restored"] = (loaded.state["progress"]["step"], loaded.rank_state["position"])

    for failing_rank in (0, 1):
        storage = FailsOnOneRank.open(directory)
        storage.failing_rank = failing_rank
        seen[f"rank {failing_rank} full"] = outcome_of(
            lambda storage=storage: commit(CheckpointManager(storage), 2, rank_state(rank))
        )
    refused = {"hook": print} if rank == 1 else {}
    seen["refused"] = outcome_of(lambda: commit(manager, 2, refused))
    losing = CheckpointManager(Losing.open(directory))
    seen["lost"] = outcome_of(lambda: commit(losing, 2, rank_state(rank)))
    unreadable = CheckpointManager(Unreadable.open(directory))
    seen["unreadable"] = outcome_of(lambda: commit(unreadable, 2, rank_state(rank)))
    seen["listed after failures"] = [record.name for record in list_checkpoints(directory)]
    dist.barrier()

    manager.save(nn.parallel.DistributedDataParallel(nn.Linear(2, 1)), None, None, 0, {"val_loss": 1.0}, 2)
    seen["ddp"] = list(manager.load()["model_state_dict"])
    commit(manager, 3, {} if rank == 0 else rank_state(rank))
    seen["records"] = [record.step for record in manager.records()]
    dist.barrier()
    if rank == 0:
        path = Path(directory) / "checkpoint_epoch0000_step00000003" / "rank00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    fresh = CheckpointManager(directory)
    seen["explicit"] = outcome_of(lambda: fresh.restore("checkpoint_epoch0000_step00000003"))
    loaded = fresh.restore("auto")
    seen["fallback"] = (loaded.manifest.step, [tuple(rejection) for rejection in loaded.rejected])
    commit(fresh, 4, rank_state(rank))
    seen["gone"] = outcome_of(lambda: CheckpointManager(f"{directory}-lost").restore("auto", saved=names_of_rank_zero))
    return seen


def names_of_rank_zero():
    assert dist.get_rank() == 0  # the others do not see what it sees, and must not decide
    return ["checkpoint_epoch0000_step00000007"]


def wide_training(width=512):
    """A model with AdamW, whose optimizer is worth a stripe for each rank, after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, 512) for _ in range(2)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def act_with_stripes(directory, rank):
    """Commit what each rank writes a stripe of; returns what each saw."""
    seen = {}
    state = wide_training()
    manager = CheckpointManager(directory, keep_last_n=3, keep_best_k=0)
    other = state if rank == 0 else wide_training(width=256)
    seen["other shapes"] = outcome_of(lambda: manager.commit(other, {}, CheckpointMeta(epoch=0, step=1)))
    for step in (1, 2):
        manager.finish(manager.begin(state, rank_state(rank), CheckpointMeta(epoch=0, step=step)))
    if rank == 0:
        path = Path(directory) / "checkpoint_epoch0000_step00000002" / "optimizer.stripe00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    dist.barrier()
    loaded = CheckpointManager(directory).restore("auto")
    seen["fallback"] = (loaded.manifest.step, [tuple(rejection) for rejection in loaded.rejected])
    seen["equal"] = are_equal(loaded.state, state)
    return seen


def are_equal(left, right):
    """Whether two nested states are the same, bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(are_equal(left[key], right[key]) for key in left)
    return left == right


def process(rank, directory, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        results.put((rank, act(f"{directory}/run", rank) | {"stripes": act_with_stripes(f"{directory}/wide", rank)}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The directory of the run, and what each rank saw."""
    directory = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=process, args=(rank, str(directory), results)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=60)
    assert [each.exitcode for each in processes] == [0, 0]
    seen = dict(results.get() for _ in processes)
    return directory / "run", [seen[0], seen[1]]


def test_both_ranks_commit_the_same_and_get_their_own_state_back(both):
    _, seen = both

    assert seen[0]["first"] == seen[1]["first"] == "checkpoint_epoch0000_step00000001"
    assert [each["restored"] for each in seen] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_all_ranks_raise_the_same_error_when_one_cannot_write(both, failing_rank):
    _, seen = both

    kind, message = seen[0][f"rank {failing_rank} full"]

    assert (kind, message) == seen[1][f"rank {failing_rank} full"]
    assert kind is CheckpointError
    assert message.startswith(f"rank {failing_rank}: [Errno 28] No space left on device")


def test_all_ranks_raise_when_one_has_what_cannot_be_stored(both):
    _, seen = both

    assert seen[0]["refused"] == seen[1]["refused"]
    assert "rank 1: rank00001.hook: builtin_function" in seen[0]["refused"][1]


def test_all_ranks_refuse_to_start_from_scratch_when_rank_zero_knows_of_a_loss(both):
    _, seen = both

    assert seen[0]["gone"] == seen[1]["gone"]
    kind, message = seen[0]["gone"]
    assert kind is CheckpointCorruptError
    assert "checkpoint_epoch0000_step00000007: it was the last that was saved, and is gone" in message


def test_storage_that_is_not_shared_is_found_before_the_commit(both):
    _, seen = both

    assert seen[0]["lost"] == seen[1]["lost"]
    assert "rank00001.json is missing" in seen[0]["lost"][1]
    assert "same storage on every node" in seen[0]["lost"][1]


def test_all_ranks_raise_when_rank_0_cannot_tell_which_checkpoints_may_go(both):
    _, seen = both

    assert seen[0]["unreadable"] == seen[1]["unreadable"]
    assert "rank 0: ValueError: Invalid URL in listing" in seen[0]["unreadable"][1]


def test_nothing_of_a_failed_commit_is_left(both):
    _, seen = both

    assert seen[0]["listed after failures"] == ["checkpoint_epoch0000_step00000001"]


def test_wrapped_model_carries_no_prefix(both):
    _, seen = both

    assert seen[0]["ddp"] == ["weight", "bias"]


def test_both_ranks_know_the_same_list_after_retention(both):
    _, seen = both

    assert seen[0]["records"] == seen[1]["records"] == [2, 3]


def test_file_of_another_rank_that_broke_makes_all_ranks_fall_back(both):
    _, seen = both

    assert seen[0]["explicit"][0] is seen[1]["explicit"][0] is CheckpointCorruptError
    assert seen[0]["fallback"] == seen[1]["fallback"]
    step, ((name, reason),) = seen[0]["fallback"]
    assert (step, name) == (2, "checkpoint_epoch0000_step00000003")
    assert reason.startswith("rank00001.safetensors has")


def test_smaller_world_restores_what_a_larger_one_saved(both):
    run, _ = both

    loaded = CheckpointManager(run).restore()

    assert verify(run, loaded.record.name) == []
    assert loaded.manifest.world_size == 2
    assert loaded.rank_state["position"] == 0


def test_each_rank_writes_a_stripe_of_about_the_same_size(both):
    run, _ = both
    checkpoint = run.parent / "wide" / "checkpoint_epoch0000_step00000001"
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}

    first = sizes["model.safetensors"] + sizes["optimizer.safetensors"]
    assert 0.6 < first / sizes["optimizer.stripe00001.safetensors"] < 1.7
    assert list(load_weights(checkpoint)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_stripes_are_one_state_again_for_any_number_of_ranks(both):
    run, seen = both

    assert seen[0]["stripes"]["equal"] is seen[1]["stripes"]["equal"] is True
    assert are_equal(CheckpointManager(run.parent / "wide").restore().state, wide_training())


def test_altered_stripe_of_another_rank_makes_all_ranks_fall_back(both):
    _, seen = both

    assert seen[0]["stripes"]["fallback"] == seen[1]["stripes"]["fallback"]
    step, ((_, reason),) = seen[0]["stripes"]["fallback"]
    assert (step, reason) == (1, "optimizer.stripe00001.safetensors was altered: its checksum is not the manifest's")


def test_optimizers_of_different_shapes_are_refused_before_anything_is_written(both):
    run, seen = both

    assert seen[0]["stripes"]["other shapes"] == seen[1]["stripes"]["other shapes"]
    assert "on rank(s) 1 than on rank 0" in seen[0]["stripes"]["other shapes"][1]
    assert not (run.parent / "wide" / "checkpoint_epoch0000_step00000001_2").exists()
