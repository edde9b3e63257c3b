import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_trainer.data.order import SampleOrder, permuted
from ray_trainer.errors import DataError

SORTED_LIMIT = 2**20
seeds = st.integers(-(2**70), 2**70)
block_lists = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


def whole(order: SampleOrder, epoch: int) -> np.ndarray:
    return order.indices(epoch, 0, order.num_samples)


def is_permutation(indices: np.ndarray) -> bool:
    return np.array_equal(np.sort(indices), np.arange(len(indices)))


@given(num_samples=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 1000))
def test_full_shuffle_is_a_permutation(num_samples, seed, epoch):
    assert is_permutation(whole(SampleOrder(num_samples, seed), epoch))


@given(sizes=block_lists, seed=seeds, window=st.integers(1, 9))
def test_block_shuffle_is_a_permutation(sizes, seed, window):
    order = SampleOrder(sum(sizes), seed, block_sizes=sizes, window_blocks=window)
    assert is_permutation(whole(order, 2))


@given(sizes=block_lists, seed=seeds, window=st.integers(1, 9), cut=st.tuples(*[st.integers(0, 1300)] * 2))
def test_seeking_in_block_shuffle_equals_slicing(sizes, seed, window, cut):
    order = SampleOrder(sum(sizes), seed, block_sizes=sizes, window_blocks=window)
    start, stop = sorted(cut)
    assert np.array_equal(order.indices(5, start, stop), whole(order, 5)[start:stop])


@given(
    num_samples=st.integers(1, 500),
    start=st.integers(0, 600),
    length=st.integers(0, 600),
    shuffle=st.booleans(),
)
def test_seeking_equals_slicing(num_samples, start, length, shuffle):
    order = SampleOrder(num_samples, 42, shuffle)
    assert np.array_equal(order.indices(1, start, start + length), whole(order, 1)[start : start + length])


@settings(max_examples=20)
@given(start=st.integers(0, 10**10 - 5000), length=st.integers(1, 5000))
def test_seeking_in_a_huge_dataset_does_not_depend_on_where_the_reading_started(start, length):
    order = SampleOrder(10**10, 42)
    part = order.indices(3, start, start + length)
    pieces = [order.indices(3, at, min(at + 700, start + length)) for at in range(start, start + length, 700)]
    assert np.array_equal(part, np.concatenate(pieces))
    assert len(np.unique(part)) == len(part)
    assert part.min() >= 0
    assert part.max() < 10**10


@pytest.mark.parametrize("num_samples", [SORTED_LIMIT, SORTED_LIMIT + 1, 1_500_007])
def test_orders_at_and_above_the_limit_of_sorting_are_permutations(num_samples):
    assert is_permutation(whole(SampleOrder(num_samples, 1), 0))


def test_every_epoch_and_every_seed_has_another_order():
    orders = {whole(SampleOrder(100, seed), epoch).tobytes() for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


def test_without_shuffling_every_epoch_has_the_order_of_the_dataset():
    order = SampleOrder(10, 42, shuffle=False, block_sizes=[4, 6])
    assert whole(order, 0).tolist() == whole(order, 7).tolist() == list(range(10))


def test_block_shuffle_reads_only_the_blocks_of_one_window_at_a_time():
    order = SampleOrder(1000, 42, block_sizes=[10] * 100, window_blocks=4)
    blocks = whole(order, 0) // 10
    windows = [set(blocks[at : at + 40].tolist()) for at in range(0, 1000, 40)]
    assert all(len(window) == 4 for window in windows)
    assert set().union(*windows) == set(range(100))


def test_small_permutations_are_all_equally_likely():
    counts: dict[bytes, int] = {}
    for key in range(24_000):
        found = permuted(4, key, 0, 4).tobytes()
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


@pytest.mark.parametrize("num_samples", [100_000, 3_000_000])
def test_shuffled_positions_are_uncorrelated_with_the_dataset(num_samples):
    order = SampleOrder(num_samples, 7).indices(0, 0, 100_000).astype(np.float64)
    limit = 4 / np.sqrt(len(order))
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < limit
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
    assert np.bincount((order * 10 // num_samples).astype(int)).min() > 9_500


def test_orders_are_pinned_because_a_resumed_run_depends_on_them():
    assert whole(SampleOrder(10, 42), 0).tolist() == [6, 9, 4, 2, 3, 0, 7, 5, 1, 8]
    assert SampleOrder(10**10, 42).indices(1, 9 * 10**9, 9 * 10**9 + 3).tolist() == [
        8279211000,
        3318305287,
        1741526046,
    ]
    assert whole(SampleOrder(9, 42, block_sizes=[2, 3, 4], window_blocks=2), 1).tolist() == [
        1,
        7,
        0,
        5,
        8,
        6,
        2,
        3,
        4,
    ]


def test_the_cached_order_cannot_be_changed_by_its_reader():
    order = SampleOrder(10, 42)
    whole(order, 0)[:] = 5
    assert is_permutation(whole(order, 0))


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="0 samples"):
        SampleOrder(0, 42)


@pytest.mark.parametrize(("sizes", "window"), [([3, 3], 8), ([10], 0), ([11, -1], 8)])
def test_blocks_that_do_not_fit_the_dataset_are_refused(sizes, window):
    with pytest.raises(DataError):
        SampleOrder(10, 42, block_sizes=sizes, window_blocks=window)
