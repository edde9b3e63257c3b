"""Gradients are added up in the order of a tree, which floating-point sums of other orders differ from."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_trainer.data.batch import BatchPlan
from ray_trainer.data.deal import share_of
from ray_trainer.gradients.tree import GradientTree, _nodes_over


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.table = nn.Embedding(4, 2, sparse=True)
        self.idle = nn.Parameter(torch.zeros(2))


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 2, generator=generator) * 10.0 ** (place % 5) for place in range(count)]


def added(leaves: dict[int, torch.Tensor], places: list[int]) -> torch.Tensor:
    model = Two()
    tree = GradientTree(model)
    for place in places:
        model.weight.grad = leaves[place].clone()
        tree.take(place)
    tree.combine([places], have_all=False)
    assert model.idle.grad is None
    return model.weight.grad


def test_sum_is_that_of_the_tree_and_not_of_any_other_order():
    leaves = gradients(7)

    total = added(dict(enumerate(leaves)), list(range(7)))

    a, b, c, d, e, f, g = leaves
    assert torch.equal(total, ((a + b) + (c + d)) + ((e + f) + g))
    assert not torch.equal(total, torch.stack(leaves).sum(0))


def test_micro_batches_that_are_missing_leave_the_others_where_they_are():
    a, _, c, d, _, f, _ = gradients(7)

    assert torch.equal(added({0: a, 2: c, 3: d, 5: f}, [0, 2, 3, 5]), (a + (c + d)) + f)
    assert torch.equal(added({5: f}, [5]), f)


def test_sparse_gradients_are_added_as_dense_ones():
    model = Two()
    tree = GradientTree(model)
    for place, row in enumerate(([1, 1], [3, 0])):
        model.table(torch.tensor(row)).sum().backward()
        tree.take(place)

    tree.combine([[0, 1]], have_all=False)

    assert model.table.weight.grad.tolist() == [[1, 1], [2, 2], [0, 0], [1, 1]]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8))
def test_micro_batches_are_the_same_for_any_number_of_ranks(num_samples, batch_size, world_size):
    global_batch = torch.arange(num_samples).numpy()

    def dealt(rank: int, ranks: int) -> list[tuple[int, list[int]]]:
        plan = BatchPlan(batch_size, num_samples, rank, ranks, deals_whole=True)
        share = share_of(global_batch, plan)
        return [(place, part.tolist()) for place, part in zip(share.places, share.micro_batches, strict=False)]

    assert [part for rank in range(world_size) for part in dealt(rank, world_size)] == dealt(0, 1)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_nodes_cover_the_places_they_are_made_of_once(places):
    covered = [
        leaf for height, index in _nodes_over(sorted(places)) for leaf in range(index << height, (index + 1) << height)
    ]

    assert covered == sorted(places)
