"""Bits that flip in the memory of one of several ranks, without anybody being told."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import Network, assert_same, carry_out, checkpoints, events, prepare
from ranks import on_ranks
from torch import distributed as dist
from torch import nn

from ray_trainer.errors import CorruptionError
from ray_trainer.replicas import Replicas

Flip = dict[str, Any]
CHANGES = {"size": 40, "gradient_accumulation_steps": 1, "epochs": 1, "save_every_n_epochs": None}  # ten steps


def flip_bit(tensor: torch.Tensor, bit: int) -> None:
    """As a particle does: nothing in torch notices."""
    words = tensor.detach().view(-1).view(torch.int32).numpy()
    words[len(words) // 2] ^= 1 << bit if bit < 31 else -(1 << 31)


def target_of(prepared: Any, where: str) -> torch.Tensor:
    if where == "kept":
        (replicas,) = [thing for thing in gc.get_objects() if isinstance(thing, Replicas)]
        return replicas._ring.peek(replicas._equal_step)["model"]["layers.0.weight"]
    if where == "table":
        return prepared.model.table
    weight = prepared.model.layers[0].weight
    return weight if where == "weight" else prepared.trainer.optimizer.state[weight]["exp_avg"]


def train(run_dir: Path, flips: list[Flip], changes: dict[str, Any], norm: bool = False) -> dict[str, Any]:
    """The full experiment, with bits that flip after steps; once each, or each time the step comes."""
    prepared = prepare(run_dir, norm, **CHANGES | changes)
    left = [flip for flip in flips if flip["rank"] == dist.get_rank()]

    def after(name: str, step: int) -> None:
        for flip in [flip for flip in left if name == "on_step_end" and flip["step"] == step]:
            flip_bit(target_of(prepared, flip.get("where", "weight")), flip.get("bit", 20))
            if not flip.get("always"):
                left.remove(flip)

    prepared.diary.on_call = after
    try:
        outcome = carry_out(prepared)
    except CorruptionError as error:
        return {"error": str(error)}
    names = ("weights", "optimizer", "schedule", "history", "order", "rows", "step")
    return {name: getattr(outcome, name) for name in names} | {"left": len(left)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {size: on_ranks(size, train, tmp_path_factory.mktemp("runs") / "clean", [], {}) for size in (2, 3)}


@pytest.mark.parametrize(
    ("world_size", "every", "flips", "decided_by"),
    [
        (2, 4, [{"rank": 1, "step": 7}], "replay"),
        (2, 4, [{"rank": 0, "step": 5, "bit": 30}], "replay"),
        (2, 4, [{"rank": 1, "step": 8, "bit": 0}], "replay"),  # the last bit, right before the comparison
        (2, 100, [{"rank": 0, "step": 9, "where": "moment"}], "replay"),  # compared because it is saved
        (3, 2, [{"rank": 2, "step": 3, "bit": 31}], "majority"),
        (3, 2, [{"rank": 0, "step": 4}], "majority"),
    ],
)
def test_flipped_bit_is_found_named_and_undone_to_the_bit(tmp_path, undisturbed, world_size, every, flips, decided_by):
    answers = on_ranks(world_size, train, tmp_path / "run", flips, {"compare_replicas_every_n_steps": every})

    assert [answer["left"] for answer in answers] == [0] * world_size  # the bit was flipped
    for answer, expected in zip(answers, undisturbed[world_size], strict=True):
        assert_same(answer, expected)
    (event,) = events(tmp_path / "run", "corruption")
    (back,) = events(tmp_path / "run", "rolled_back")
    (flip,) = flips
    step = min(10, -(-flip["step"] // every) * every)
    assert (event["ranks"], event["step"], event["decided_by"]) == ([flip["rank"]], step, decided_by)
    assert (back["step"], back["to_step"]) == (step, (step - 1) // every * every)
    name = "layers.0.weight (exp_avg)" if flip.get("where") == "moment" else "layers.0.weight"
    assert name in event["tensors"]


def test_bit_in_the_kept_state_as_well_leads_back_to_the_checkpoint_before(tmp_path, undisturbed):
    flips = [{"rank": 1, "step": 7}, {"rank": 0, "step": 7, "where": "kept"}]

    changes = {"compare_replicas_every_n_steps": 4, "save_every_n_steps": 3}
    answers = on_ranks(2, train, tmp_path / "run", flips, changes)

    for answer, expected in zip(answers, undisturbed[2], strict=True):
        assert_same(answer, expected)
    (event,) = events(tmp_path / "run", "corruption")
    assert event["ranks"] == [1]


def test_no_checkpoint_holds_what_was_not_equal(tmp_path):
    flips = [{"rank": 0, "step": 5}]

    on_ranks(2, train, tmp_path / "run", flips, {"compare_replicas_every_n_steps": 100, "save_every_n_steps": 5})

    clean = on_ranks(2, train, tmp_path / "clean", [], {"save_every_n_steps": 5})
    assert clean
    for name in checkpoints(tmp_path / "clean"):
        (own,) = [found for found in checkpoints(tmp_path / "run") if found[:34] == name[:34]]
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (tmp_path / "run" / own / file).read_bytes() == (tmp_path / "clean" / name / file).read_bytes()


def test_memory_that_fails_again_and_again_ends_the_run_on_all_ranks(tmp_path):
    flips = [{"rank": 1, "step": 6, "always": True}]

    answers = on_ranks(3, train, tmp_path / "run", flips, {"compare_replicas_every_n_steps": 2})

    for answer in answers:
        assert "differ at step 6, again after 2 replays" in answer["error"]
        assert "rank 1 is wrong" in answer["error"]
        assert "layers.0.weight" in answer["error"]


class WithTable(Network):
    """Has a constant table, and a buffer that is each rank's own."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("own", torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.own = self.own + features[:, 0].sum()
        return super().forward(features) + 0 * self.table.sum()


def train_buffers(run_dir: Path, flips: list[Flip]) -> dict[str, Any]:
    """The same with normalisation layers, whose running means are each rank's own between two passes."""
    import experiments

    experiments.Network = lambda norm: WithTable()
    return train(run_dir, flips, {"compare_replicas_every_n_steps": 3, "epochs": 2})


def test_buffers_that_are_each_rank_s_own_are_no_corruption(tmp_path):
    answers = on_ranks(2, train_buffers, tmp_path / "run", [])

    assert [answer["step"] for answer in answers] == [20, 20]
    assert events(tmp_path / "run", "corruption") == []


def test_constant_buffer_of_one_rank_is_put_right(tmp_path):
    answers = on_ranks(2, train_buffers, tmp_path / "run", [{"rank": 1, "step": 9, "where": "table"}])

    assert [answer["left"] for answer in answers] == [0, 0]
    (event,) = events(tmp_path / "run", "corruption")
    assert (event["ranks"], event["tensors"]) == ([1], ["table"])


def test_model_is_what_compares_and_one_process_has_nothing_to_compare():
    assert not Replicas(1, nn.Linear(1, 1), None, None).is_on
