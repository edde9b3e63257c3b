"""Numbers that go wrong on one of several ranks."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import experiments
import pytest
import torch
from experiments import Network, assert_same, carry_out, events, prepare
from ranks import exit_codes, on_ranks
from torch import distributed as dist

from ray_trainer.metrics import EventLog, read_events
from ray_trainer.storage import Storage


def train(run_dir: Path, bad: list[int], changes: dict[str, Any]) -> dict[str, Any]:
    """Six steps an epoch of four samples each; the last sample of the bad ones, which is rank 1's, is no number."""
    prepared = prepare(run_dir, size=24, shuffle=False, gradient_accumulation_steps=1, **changes)
    for step in bad:
        prepared.train_set.features[4 * step - 1, 1] = math.nan
    outcome = carry_out(prepared)
    return {name: getattr(outcome, name) for name in ("weights", "optimizer", "schedule", "history", "step")}


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_ranks_roll_back_together_as_if_the_batches_had_never_been_there(tmp_path, parallelism):
    back = {"on_bad_gradients": "rollback", "rollback_points_every_n_steps": 2, "parallelism": parallelism}

    rolled = on_ranks(2, train, tmp_path / "back", [4], back | {"on_spike": "skip"})
    skipped = on_ranks(2, train, tmp_path / "skips", [3, 4], {"parallelism": parallelism})

    for one, other in zip(rolled, skipped, strict=True):
        assert_same(one["step"], 12)
        assert_same(one["history"], other["history"])
        if parallelism == "ddp":
            assert_same(one, other)
    assert [(event["first_skipped"], event["step"]) for event in events(tmp_path / "back", "rolled_back")] == [
        (3, 4),
        (9, 10),
    ]


class Hungry(Network):
    """Needs more memory than there is for more than two samples, on rank 1 from some pass on."""

    passes = 0
    since = 3

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.passes += int(self.training)
        if self.training and len(features) > 2 and dist.get_rank() == 1 and self.passes >= self.since:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(features)


def train_hungry(run_dir: Path, since: int, changes: dict[str, Any]) -> dict[str, Any]:
    Hungry.since = since
    experiments.Network = lambda norm: Hungry()
    prepared = prepare(run_dir, batch_size=4, gradient_accumulation_steps=1, save_every_n_steps=2, **changes)
    outcome = carry_out(prepared)
    return {name: getattr(outcome, name) for name in ("weights", "optimizer", "history", "step")}


@pytest.mark.parametrize(("num_ranks", "step"), [(2, 3), (3, 1)])  # three begin with a pass that is thrown away
def test_ranks_that_start_again_after_a_shortage_of_memory_on_one_take_smaller_pieces_on_all(tmp_path, num_ranks, step):
    changes = {"on_out_of_memory": "halve", "size": 24 * num_ranks}

    first = exit_codes(num_ranks, train_hungry, tmp_path / "run", step, changes)
    answers = on_ranks(num_ranks, train_hungry, tmp_path / "run", step, changes)

    assert first[1] == 1
    assert_same(answers[0]["weights"], answers[1]["weights"])
    assert answers[0]["step"] == 12
    (event,) = events(tmp_path / "run", "out_of_memory")
    assert (event["step"], event["rank"], event["pieces"], event["samples_at_once"]) == (step, 1, 2, 2)


class Greedy(Network):
    """Takes so much memory for more than two samples that its process is ended, on rank 1 in some pass.

    It is by SIGKILL, as Ray does it, or by the kernel, which limits a group of processes.
    """

    third = 0  # the pass of the third step
    group: Path | None = None
    passes = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.passes += int(self.training)
        if self.training and len(features) > 2 and dist.get_rank() == 1 and self.passes == self.third:
            if self.group is None:
                os.kill(os.getpid(), signal.SIGKILL)
            Path(self.group, "cgroup.procs").write_text(str(os.getpid()))
            taken = [b"x" * (8 << 20) for _ in range(100)]
            raise AssertionError(f"{len(taken)} pieces of memory were there")
        return super().forward(features)


@contextmanager
def small_memory() -> Iterator[Path]:
    """A group of processes whose memory the kernel limits, where this process may make one."""
    group = Path(f"/sys/fs/cgroup/memory/ray-trainer-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"needs to limit memory: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def train_greedy(run_dir: Path, third: int, group: Path | None = None) -> dict[str, Any]:
    Greedy.third, Greedy.group = third, group
    experiments.Network = lambda norm: Greedy()
    changes = {"on_out_of_memory": "halve", "size": 48, "save_every_n_steps": 2}
    prepared = prepare(run_dir, batch_size=4, gradient_accumulation_steps=1, **changes)
    outcome = carry_out(prepared)
    return {name: getattr(outcome, name) for name in ("weights", "optimizer", "history", "step")}


@pytest.mark.parametrize("by_kernel", [False, True])
def test_rank_that_is_ended_for_want_of_memory_at_the_same_step_twice_takes_smaller_pieces(tmp_path, by_kernel):
    with small_memory() if by_kernel else nullcontext() as group:
        for third in (3, 1):  # the second time from the checkpoint of step 2
            codes = exit_codes(2, train_greedy, tmp_path / "run", third, group)
            assert codes[1] == -signal.SIGKILL
            if not by_kernel:
                log = EventLog.of_controller(Storage.open(tmp_path / "run"))
                log.record("failure", cause="as Ray tells of it", out_of_memory=[1])
        answers = on_ranks(2, train_greedy, tmp_path / "run", 1, group)

    died = events(tmp_path / "run", "ended_for_memory")
    assert [(event["step"], event["rank"], event["failed_attempt"]) for event in died] == [(3, 1, 1), (3, 1, 2)]
    (halved,) = events(tmp_path / "run", "out_of_memory")
    assert (halved["step"], halved["rank"], halved["pieces"], halved["samples_at_once"]) == (3, 1, 2, 2)
    EventLog(Storage.open(tmp_path / "told"), 1).record("out_of_memory", 3, 0, pieces=2)
    expected = on_ranks(2, train_greedy, tmp_path / "told", 0)
    for answer, other in zip(answers, expected, strict=True):
        assert_same(answer, other)


class Fragile(Network):
    """Takes the whole process with it at one of the samples."""

    in_backward = False

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output = super().forward(features)
        if self.training and 11 in features[:, 0].int().tolist():
            if not self.in_backward:
                os._exit(9)
            output.register_hook(lambda gradient: os._exit(9))
        return output


def train_fragile(answers: Path, uri: str, environment: dict[str, str], in_backward: bool) -> Any:
    os.environ.update(environment)
    Fragile.in_backward = in_backward
    experiments.Network = lambda norm: Fragile()
    changes = {"on_bad_data": "quarantine", "max_bad_ratio": 0.1, "save_every_n_steps": 1}
    prepared = prepare(uri, size=24, gradient_accumulation_steps=1, random_seed=3, **changes)
    prepared.trainer.train(prepared.train_set, prepared.val_set, "auto")
    return prepared.diary.order


# three begin with a pass that is thrown away, of the same batch
@pytest.mark.parametrize(("num_ranks", "in_backward", "on_s3"), [(2, True, False), (3, False, False), (2, False, True)])
def test_batch_at_which_a_process_dies_twice_is_left_out_by_all_ranks(tmp_path, request, num_ranks, in_backward, on_s3):
    uri, environment = str(tmp_path / "run"), {}
    if on_s3:
        server = request.getfixturevalue("s3_server")
        uri, environment = f"s3://{server.new_bucket()}/run", server.environment
    arguments = (uri, environment, in_backward)

    codes = [exit_codes(num_ranks, train_fragile, tmp_path / "run", *arguments) for _ in range(2)]
    orders = on_ranks(num_ranks, train_fragile, tmp_path / "run", *arguments)

    assert all(9 in ended for ended in codes)
    told = read_events(Storage.open(uri))
    failed = [event for event in told if event["event"] == "batch_failed"]
    (left_out,) = (event for event in told if event["event"] == "batch_quarantined")
    assert [event["error"] for event in failed] == ["the process died"] * 2
    assert failed[0]["samples"] == failed[1]["samples"]
    assert 11 in left_out["samples"]
    seen = [sample for order in orders for epoch, _, samples in order if epoch == 1 for sample in samples]
    assert sorted(seen) == [sample for sample in range(24) if sample not in left_out["samples"]]
