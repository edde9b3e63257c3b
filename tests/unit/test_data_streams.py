import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ray_trainer.data.source import BatchPlan, BatchSource, StepBatch, build_source
from ray_trainer.errors import DataError


class Augmented(Dataset):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random()])


class Shuffled(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        numbers = list(range(13))
        random.shuffle(numbers)
        return iter(torch.tensor(numbers))


class Counting(IterableDataset):
    """Knows where it stands."""

    def __init__(self) -> None:
        self.position = 0
        self.reads = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < 12:
            self.reads += 1
            self.position += 1
            yield self.position
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Ranged:
    """Iterable, of unknown length, and no class of PyTorch's."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


class Columns:
    """What a streamed Hugging Face dataset looks like from outside: lists, unless tensors are asked for."""

    def __init__(self, form: Any = list) -> None:
        self.form = form

    def with_format(self, name: str) -> "Columns":
        return Columns({"torch": torch.tensor}[name])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"x": self.form([number, 0.5])} for number in range(6))


def plan(batch_size: int = 4, global_batch_size: int | None = None, **options: Any) -> BatchPlan:
    return BatchPlan(batch_size, global_batch_size or batch_size, **options)


def values(steps: Iterator[StepBatch]) -> list[Any]:
    return [[torch.as_tensor(batch).tolist() for batch in step.micro_batches] for step in steps]


def resumed(source: BatchSource, epoch: int, start: int) -> list[Any]:
    torch.rand(5)
    random.random()
    return values(source.steps(epoch, start))


def test_batches_of_a_loader_are_taken_as_they_are_and_grouped_into_steps():
    loader = DataLoader(torch.arange(22), batch_size=3)
    source = build_source(loader, plan(3, 6))
    assert [step.num_samples for step in source.steps(0)] == [6, 6, 6, 4]
    assert source.steps_per_epoch() == 4
    assert [number for step in values(source.steps(0)) for batch in step for number in batch] == list(range(22))


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"generator": True}, {"weighted": True}])
def test_a_resumed_loader_goes_on_with_the_same_batches(options):
    def source() -> BatchSource:
        arguments = dict(options)
        if arguments.pop("generator", False):
            arguments["generator"] = torch.Generator()
        if arguments.pop("weighted", False):
            arguments["sampler"] = WeightedRandomSampler([1.0] * 22, 22)
        else:
            arguments["sampler"] = RandomSampler(range(22), generator=arguments.get("generator"))
        return build_source(DataLoader(Augmented(), batch_size=3, **arguments), plan(3, 6))

    unbroken = source()
    epochs = [values(unbroken.steps(epoch)) for epoch in range(3)]
    assert unbroken.exact
    assert epochs[0] != epochs[1] != epochs[2]
    assert resumed(source(), 2, 2) == epochs[2][2:]


def test_an_iterable_that_shuffles_with_the_global_generator_repeats_itself_and_warns(caplog):
    with caplog.at_level(logging.WARNING):
        source = build_source(Shuffled(), plan(2))
    assert not source.exact
    assert "Shuffled has no state_dict" in caplog.text
    whole = values(source.steps(1))
    assert resumed(build_source(Shuffled(), plan(2)), 1, 3) == whole[3:]
    assert whole != values(source.steps(0))


def test_an_iterable_that_knows_its_position_is_not_read_again():
    source = build_source(Counting(), plan(2, 4))
    steps = source.steps(0)
    next(steps)
    state = source.state_dict()
    assert state == {"epoch": 0, "batches": 2, "loader": {"position": 4}}

    dataset = Counting()
    fresh = build_source(dataset, plan(2, 4))
    fresh.load_state_dict(state)
    assert values(fresh.steps(0, 1)) == values(steps) == [[[5, 6], [7, 8]], [[9, 10], [11, 12]]]
    assert dataset.reads == 8
    assert fresh.exact


def test_streamed_columns_of_hugging_face_become_tensors_unless_a_collator_makes_the_batch():
    (batch,) = next(build_source(Columns(), plan(3)).steps(0)).micro_batches
    assert batch["x"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]
    (samples,) = next(build_source(Columns(), plan(3), collate_fn=list).steps(0)).micro_batches
    assert samples[0] == {"x": [0, 0.5]}


class BufferShuffledExamples:
    """The part of a streamed Hugging Face dataset that shuffles it; found by its name."""


class Wrapped:
    ex_iterable = BufferShuffledExamples()


def test_state_that_leaves_out_a_shuffle_buffer_is_not_used(caplog):
    dataset = Counting()
    dataset._ex_iterable = Wrapped()  # type: ignore[attr-defined]
    source = build_source(dataset, plan(2, 4))

    assert source.state_dict() == {}
    assert not source.exact
    assert "leaves out its shuffle buffer" in caplog.text


def test_a_state_of_another_place_is_not_used():
    source = build_source(Counting(), plan(4))
    source.load_state_dict({"epoch": 0, "batches": 2, "loader": {"position": 8}})
    assert values(source.steps(0, 1)) == [[[5, 6, 7, 8]], [[9, 10, 11, 12]]]


def test_an_iterable_without_length_is_read_to_its_end():
    source = build_source(Ranged(), plan(3))
    assert source.steps_per_epoch() is None
    assert source.num_samples is None
    assert values(source.steps(0)) == [[[0, 1, 2]], [[3, 4, 5]], [[6]]]
    assert values(source.steps(1)) == values(source.steps(0))


@pytest.mark.parametrize(("start", "expected"), [(0, [6, 3]), (1, [3]), (2, [])])
def test_a_limit_counts_batches_from_the_start_of_the_epoch(start, expected):
    source = build_source(DataLoader(torch.arange(30), batch_size=3), plan(3, 6, limit_batches=3))
    assert [step.num_samples for step in source.steps(0, start)] == expected
    assert source.steps_per_epoch() == 2


@pytest.mark.parametrize("data", [DataLoader(torch.arange(4)), Ranged(), Shuffled()])
def test_loaders_and_iterables_cannot_be_shared_between_workers(data):
    with pytest.raises(DataError, match="cannot be shared between 2 workers"):
        build_source(data, plan(2, rank=0, world_size=2))


def test_an_iterator_is_refused_because_it_can_be_read_only_once():
    with pytest.raises(DataError, match="only once"):
        build_source(iter(range(3)), plan())


def test_a_loader_without_batches_is_refused():
    with pytest.raises(DataError, match="empty"):
        build_source(DataLoader(TensorDataset(torch.zeros(0, 2))), plan())

    class Nothing(Ranged):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="no batch in epoch 0"):
        list(build_source(Nothing(), plan()).steps(0))


def test_data_that_became_shorter_is_noticed():
    source = build_source(Ranged(), plan(3))
    with pytest.raises(DataError, match="ended after 3 batches, but 5"):
        list(source.steps(0, 5))


def test_samplers_that_want_to_know_the_epoch_are_told():
    class Sampler:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch, 0])

    source = build_source(DataLoader(torch.arange(9), sampler=Sampler(), batch_size=2), plan(2))
    assert values(source.steps(5)) == [[[5, 0]]]


def test_the_fingerprint_of_a_loader_is_that_of_its_data():
    def of(data: Any) -> str:
        return build_source(DataLoader(data, batch_size=2), plan(2)).fingerprint

    assert of(torch.arange(9).tolist()) == of(torch.arange(9).tolist()) != of(torch.arange(1, 10).tolist())
    assert build_source(Ranged(), plan()).fingerprint != build_source(Shuffled(), plan()).fingerprint
