"""How what is equal on all ranks is divided among those that write it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_trainer.checkpoint.stripes import MIN_STRIPED_BYTES, digest, divide, size_bytes


def tensors_of(*megabytes: float) -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.empty(int(size * 1e6), dtype=torch.uint8) for index, size in enumerate(megabytes)}


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    written=st.integers(0, 100),
    count=st.integers(1, 9),
)
def test_every_tensor_is_in_exactly_one_stripe_and_neighbours_stay_together(sizes, written, count):
    tensors = tensors_of(*sizes)

    parts = divide(tensors, written * 1_000_000, count)

    assert len(parts) == count
    assert [name for part in parts for name in part] == list(tensors)


def test_stripes_are_balanced_with_what_the_first_rank_writes_besides():
    tensors = tensors_of(*[1.0] * 80)

    with_two = [size_bytes(part) / 1e6 for part in divide(tensors, 40_000_000, 2)]
    with_three = [size_bytes(part) / 1e6 for part in divide(tensors, 10_000_000, 3)]

    assert with_two == [20, 60]
    assert with_three == [20, 30, 30]


def test_first_rank_that_writes_enough_gets_no_stripe():
    parts = divide(tensors_of(*[1.0] * 10), 50_000_000, 3)

    assert [len(part) for part in parts] == [0, 5, 5]


def test_little_is_not_divided():
    tensors = {"a": torch.empty(MIN_STRIPED_BYTES // 2, dtype=torch.uint8)}

    assert divide(tensors, 0, 3) == [tensors, {}, {}]


def test_digest_tells_other_shapes_and_other_divisions():
    tensors = tensors_of(3, 3)

    halves = digest(divide(tensors, 0, 2))

    assert halves == digest(divide(tensors_of(3, 3), 0, 2))
    assert halves != digest(divide(tensors_of(3, 2), 0, 2))
    assert halves != digest(divide(tensors, 50_000_000, 2))
