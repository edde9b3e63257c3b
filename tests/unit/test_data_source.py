import logging
import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from ray_trainer.data.order import SampleOrder
from ray_trainer.data.source import BatchPlan, StepBatch, build_source
from ray_trainer.errors import ConfigError, DataError
from ray_trainer.seeding import seed_sample


def numbered(num_samples: int, width: int = 3) -> TensorDataset:
    labels = torch.arange(num_samples)
    return TensorDataset(labels[:, None].expand(-1, width).float(), labels)


def plan(batch_size: int = 4, global_batch_size: int | None = None, **options: object) -> BatchPlan:
    return BatchPlan(batch_size, global_batch_size or batch_size, **options)  # type: ignore[arg-type]


def labels(step: StepBatch) -> list[int]:
    return [int(label) for micro_batch in step.micro_batches for label in micro_batch[1]]


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


class Augmented(Dataset):
    """Draws from all three generators for each sample."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(2) + random.random() + np.random.rand(), index


class Together(Augmented):
    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [(torch.rand(2), index) for index in indices]


class Broken(Augmented):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            raise OSError("disk on fire")
        return super().__getitem__(index)


class BrokenTogether(Broken):
    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


class Columns:
    """What a Hugging Face dataset looks like from outside."""

    column_names = ("x", "text", "ragged")
    features = ("x", "text", "ragged")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, rows: int | list[int]) -> dict[str, list[object]]:
        assert isinstance(rows, list)
        return {
            "x": [[float(row), 1.0] for row in rows],
            "text": [f"row {row}" for row in rows],
            "ragged": [[row] * row for row in rows],
        }


@given(
    num_samples=st.integers(1, 60),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    global_batch_size=st.integers(1, 20),
    epoch=st.integers(0, 3),
)
def test_ranks_together_train_on_each_global_batch_of_the_order(
    num_samples, world_size, batch_size, global_batch_size, epoch
):
    data, order = numbered(num_samples), SampleOrder(num_samples, 42)
    sources = [
        build_source(data, plan(batch_size, global_batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    steps = list(zip(*(source.steps(epoch) for source in sources), strict=True))
    assert len(steps) == sources[0].steps_per_epoch() == -(-num_samples // global_batch_size)
    for place, parts in enumerate(steps):
        begin = place * global_batch_size
        expected = order.indices(epoch, begin, begin + global_batch_size)
        for part, share in zip(parts, np.array_split(expected, world_size), strict=True):
            assert part.num_samples == len(share)
            assert labels(part) == (share.tolist() if len(share) else [expected[0]])
            assert all(1 <= len(micro_batch[1]) <= batch_size for micro_batch in part.micro_batches)


@given(start=st.integers(0, 12), batch_size=st.integers(1, 9))
def test_starting_in_the_middle_equals_the_rest_of_the_epoch(start, batch_size):
    source = build_source(numbered(31), plan(batch_size))
    assert same(list(source.steps(2, start)), list(source.steps(2))[start:])


def test_a_long_epoch_is_one_order_although_it_is_found_piece_by_piece():
    source = build_source(numbered(40_000, width=1), plan(300, 700))
    seen = [label for step in source.steps(0) for label in labels(step)]
    assert seen == SampleOrder(40_000, 42).indices(0, 0, 40_000).tolist()


def test_a_short_last_batch_is_trained_on_unless_it_is_dropped():
    kept, dropped = build_source(numbered(10), plan(4)), build_source(numbered(10), plan(4, drop_last=True))
    assert [step.num_samples for step in kept.steps(0)] == [4, 4, 2]
    assert [step.num_samples for step in dropped.steps(0)] == [4, 4]
    assert (kept.num_samples, dropped.num_samples) == (10, 8)


def test_a_dataset_smaller_than_the_world_gives_stand_ins_to_the_other_ranks():
    steps = [next(build_source(numbered(2), plan(4, 16, rank=r, world_size=4)).steps(0)) for r in range(4)]
    assert [step.num_samples for step in steps] == [1, 1, 0, 0]
    assert all(len(step.micro_batches) == 1 for step in steps)
    assert labels(steps[2]) == labels(steps[0])


@pytest.mark.parametrize(("limit", "expected"), [(1, [8]), (2, [16]), (3, [16, 8]), (100, [16, 16, 5])])
def test_a_limit_counts_micro_batches_of_each_rank(limit, expected):
    ranks = [plan(4, 16, rank=rank, world_size=2, limit_batches=limit) for rank in range(2)]
    sizes = zip(*([s.num_samples for s in build_source(numbered(37), p).steps(0)] for p in ranks), strict=True)
    assert [sum(size) for size in sizes] == expected


def test_without_shuffling_samples_come_in_their_own_order():
    steps = build_source(numbered(9), plan(4, shuffle=False)).steps(5)
    assert [label for step in steps for label in labels(step)] == list(range(9))


@pytest.mark.parametrize("data", [numbered(0), [], Subset(numbered(5), [])])
def test_an_empty_dataset_is_refused(data):
    with pytest.raises(DataError, match="0 samples"):
        build_source(data, plan())


def test_dropping_all_there_is_is_refused():
    with pytest.raises(DataError, match="3 samples, fewer than one global batch of 4"):
        build_source(numbered(3), plan(4, drop_last=True))


NO_DATASETS = [
    {"train": numbered(3)},
    torch.zeros(3),
    (torch.zeros(3), torch.zeros(3)),
    (np.zeros(3), np.zeros(3)),
    pd.DataFrame({"x": [1.0]}),
    "train.csv",
    7,
    None,
]


@pytest.mark.parametrize("data", NO_DATASETS, ids=lambda data: type(data).__name__)
def test_what_is_no_dataset_is_refused(data):
    with pytest.raises(DataError):
        build_source(data, plan())


def test_a_plan_that_cannot_be_lists_every_error():
    with pytest.raises(ConfigError, match=r"batch_size is 0(.|\n)*num_loader_workers is -1"):
        BatchPlan(0, 4, num_loader_workers=-1)
    with pytest.raises(ConfigError, match="rank is 2"):
        BatchPlan(1, 4, rank=2, world_size=2)


def test_a_subset_of_a_subset_gives_its_own_samples():
    data = Subset(Subset(numbered(20), list(range(5, 15))), [1, 3, 5])
    step = next(build_source(data, plan(3, shuffle=False)).steps(0))
    assert labels(step) == [6, 8, 10]
    assert isinstance(step.micro_batches[0], tuple)


def test_a_tensor_dataset_with_a_method_of_its_own_is_read_through_it():
    class Negated(TensorDataset):
        def __getitem__(self, index):
            return tuple(-tensor for tensor in super().__getitem__(index))

    step = next(build_source(Negated(torch.arange(4), torch.arange(4)), plan(4, shuffle=False)).steps(0))
    assert labels(step) == [0, -1, -2, -3]


def test_a_list_of_tensors_becomes_one_column():
    step = next(build_source([torch.full((2,), i) for i in range(4)], plan(4, shuffle=False)).steps(0))
    assert same(step.micro_batches, [(torch.arange(4)[:, None].expand(4, 2),)])


def test_columns_become_tensors_and_what_is_no_number_stays_a_list():
    step = next(build_source(Columns(), plan(3, shuffle=False)).steps(0))
    assert same(step.micro_batches[0]["x"], torch.tensor([[0.0, 1], [1, 1], [2, 1]], dtype=torch.float64))
    assert step.micro_batches[0]["text"] == ["row 0", "row 1", "row 2"]
    assert step.micro_batches[0]["ragged"] == [[], [1], [2, 2]]


def test_a_collator_is_given_samples_even_of_a_tensor_dataset():
    source = build_source(numbered(4), plan(4, shuffle=False), collate_fn=lambda samples: len(samples))
    assert next(source.steps(0)).micro_batches == [4]


def test_augmentation_depends_on_seed_epoch_and_sample_only():
    def seen(epoch=0, seed=42, **options):
        steps = build_source(Augmented(), plan(4, seed=seed, **options)).steps(epoch)
        return {int(i): tuple(x.tolist()) for s in steps for x, i in zip(*s.micro_batches[0], strict=True)}

    whole = seen()
    torch.rand(1)
    part = seen(shuffle=False, rank=1, world_size=2)
    assert all(whole[index] == value for index, value in part.items())
    assert len(part) < len(whole)
    assert not set(whole.values()) & set(seen(epoch=1).values())
    assert not set(whole.values()) & set(seen(seed=1).values())


@pytest.mark.parametrize("draw", [random.random, np.random.randn, lambda: float(torch.rand(()))])
def test_a_dataset_that_draws_now_and_then_is_as_if_seeded_for_each_sample(draw):
    class Rare(Augmented):
        def __getitem__(self, index):
            return (draw() if index % 10 == 7 else 0.0), index

    seen = [step.micro_batches[0] for step in build_source(Rare(), plan(2, shuffle=False)).steps(0)]
    values = {int(i): float(x) for batch in seen for x, i in zip(*batch, strict=True)}
    for index in (7, 17):
        seed_sample(42, 0, index)
        assert values[index] == draw()
    assert all(value == 0 for index, value in values.items() if index % 10 != 7)


def test_reading_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    source = build_source(Augmented(), plan(4))
    list(source.steps(0))
    assert source.fingerprint
    assert torch.equal(torch.rand(1), expected)


def test_a_collator_that_draws_repeats_itself():
    def masked(samples):
        return torch.rand(len(samples))

    source = build_source(Augmented(), plan(4), masked)
    assert same(list(source.steps(1, 3)), list(source.steps(1))[3:])
    assert not same(list(source.steps(1)), list(source.steps(2)))


@pytest.mark.parametrize("dataset", [Augmented(), Together()])
def test_loader_processes_change_nothing(dataset):
    here = build_source(dataset, plan(3, 7, rank=1, world_size=2))
    there = build_source(dataset, plan(3, 7, rank=1, world_size=2, num_loader_workers=2))
    for epoch in (0, 1):
        assert same(list(here.steps(epoch, 1)), list(there.steps(epoch, 1)))


def test_loader_processes_are_ready_again_after_an_epoch_that_was_left_early():
    source = build_source(Augmented(), plan(3, num_loader_workers=1))
    next(source.steps(0))
    assert same(list(source.steps(1)), list(build_source(Augmented(), plan(3)).steps(1)))


@pytest.mark.parametrize("dataset", [Broken(), BrokenTogether()])
@pytest.mark.parametrize("num_loader_workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_with_its_cause(dataset, num_loader_workers):
    source = build_source(dataset, plan(4, num_loader_workers=num_loader_workers))
    with pytest.raises(DataError, match=r"Sample 7 of Broken.* could not be read: OSError: disk on fire"):
        list(source.steps(0))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"x": torch.zeros(2), "y": 1}, r"'x' of sample 2 is float32 \[2\], of others float32 \[3\]\."),
        ({"x": None, "y": 1}, r"'x' of sample 2 is NoneType, of others float32 \[3\]\."),
        (None, r"sample 2 is NoneType, of others dict\."),
    ],
)
def test_sample_that_is_not_like_the_others_is_named(odd, told):
    samples = [{"x": torch.zeros(3), "y": 0}] * 2 + [odd] + [{"x": torch.zeros(3), "y": 0}]
    source = build_source(samples, plan(4, shuffle=False))
    with pytest.raises(DataError, match=rf"samples \[0, 1, 2, 3\] could not be put into one batch.*{told}"):
        list(source.steps(0))


def test_line_of_the_dataset_that_failed_is_told():
    source = build_source(Broken(), plan(23))
    with pytest.raises(
        DataError, match=r'disk on fire \(.*test_data_source.py, line \d+: raise OSError\("disk on fire"'
    ):
        list(source.steps(0))


def test_fingerprints_tell_data_apart_and_repeat():
    def changed() -> TensorDataset:
        inputs, targets = numbered(50).tensors
        inputs = inputs.clone()
        inputs[17] += 1
        return TensorDataset(inputs, targets)

    datasets = [
        numbered(50),
        numbered(51),
        numbered(50, width=2),
        changed(),
        TensorDataset(torch.zeros(50)),
        TensorDataset(torch.zeros(50).double()),
        Subset(numbered(50), range(49)),
        Subset(numbered(50), range(1, 50)),
        Augmented(),
        Columns(),
        list(range(50)),
        list(range(1, 51)),
    ]
    prints = [build_source(data, plan()).fingerprint for data in datasets]
    assert len(set(prints)) == len(prints)
    assert prints == [build_source(data, plan(3, seed=1)).fingerprint for data in datasets]


def test_samples_that_differ_each_time_are_told_and_known_by_their_form(caplog):
    class Restless(Augmented):
        generator = np.random.default_rng()

        def __getitem__(self, index):
            return self.generator.random(3), index

    with caplog.at_level(logging.WARNING):
        first, again = (build_source(Restless(), plan()).fingerprint for _ in range(2))
    assert first == again
    assert "twice gives two results" in caplog.text
