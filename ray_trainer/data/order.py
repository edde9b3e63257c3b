"""The order of samples as a pure function of the seed and the epoch.

A position in an epoch costs the same to find whether it is the first or the last, and nothing has to be
saved but the position. The fingerprint of the data is compared when a run goes on; the order itself depends
on nothing of the data but its length (and its blocks, where rows are shuffled block by block).

The bits are part of the contract: a run that goes on under another version must see the same order. They
therefore come from SplitMix64 alone, not from NumPy's generators, whose streams may change between versions.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

import numpy as np
import numpy.typing as npt

from ray_trainer.errors import DataError
from ray_trainer.seeding import derive_seed

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Every constant here decides the order: changing one changes what every run sees.
_SORTED_UP_TO = 1 << 20
_FEISTEL_ROUNDS = 8
_ORDER, _BLOCKS, _ROWS = 3, 0, 1


class SampleOrder:
    """The global sequence of sample indices of every epoch.

    Three kinds: as they come (``shuffle=False``); fully shuffled; or, for data larger than memory, shuffled
    block by block: the blocks are permuted, then the rows within each window of ``window_blocks`` successive
    ones, so that reading in order touches only a window's blocks at a time.

    Args:
        num_samples: at least 1.
        seed: of the run.
        shuffle: False keeps the order of the dataset in every epoch.
        block_sizes: number of rows of each block, in the order of the dataset; None shuffles fully.
        window_blocks: blocks shuffled together.

    Raises:
        DataError: there are no samples, or the blocks do not add up to them.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: bool = True,
        block_sizes: Sequence[int] | None = None,
        window_blocks: int = 8,
    ) -> None:
        if num_samples < 1:
            raise DataError(f"The dataset has {num_samples} samples; there must be at least 1 to train on.")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._blocks = None if block_sizes is None else _Blocks(block_sizes, num_samples, window_blocks)

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Dataset indices at the positions ``start`` to ``stop`` of an epoch.

        Costs memory and time in proportion to ``stop - start``, after the first call of an epoch, which may
        sort up to 2**20 keys (or one key a block).

        Args:
            epoch: counted from 0.
            start: first position, from 0.
            stop: position after the last; what exceeds the epoch is left out.
        """
        stop = min(stop, self.num_samples)
        if start >= stop:
            return np.empty(0, np.int64)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        key = derive_seed(_ORDER, self.seed, epoch)
        if self._blocks is None:
            return permuted(self.num_samples, key, start, stop)
        return self._blocks.indices(key, start, stop)


def permuted(size: int, key: int, start: int, stop: int) -> Indices:
    """Elements ``start`` to ``stop`` of the permutation of ``range(size)`` that belongs to ``key``.

    Small ones come from sorting random keys, so that each permutation is equally likely; large ones from a
    keyed permutation in constant memory.
    """
    if size <= _SORTED_UP_TO:
        return _sorted_permutation(size, key)[start:stop].copy()
    return _feistel_permutation(size, key, np.arange(start, stop, dtype=np.uint64))


class _Blocks:
    """Block-wise order: permuted blocks, then permuted rows within windows of blocks."""

    def __init__(self, block_sizes: Sequence[int], num_samples: int, window_blocks: int) -> None:
        self._sizes = np.asarray(block_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._window_blocks = window_blocks
        self._newest: tuple[int, Indices, Indices] | None = None
        if self._sizes.sum() != num_samples or (self._sizes < 0).any():
            raise DataError(f"The blocks hold {self._sizes.sum()} rows, but the dataset has {num_samples} samples.")
        if window_blocks < 1:
            raise DataError(f"window_blocks is {window_blocks}; at least 1 block is shuffled at a time.")

    def indices(self, key: int, start: int, stop: int) -> Indices:
        blocks, ends = self._windows(key)
        parts: list[Indices] = []
        window = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin, end = int(ends[window - 1]) if window else 0, int(ends[window])
            members = blocks[window * self._window_blocks : (window + 1) * self._window_blocks]
            rows = permuted(end - begin, derive_seed(key, _ROWS, window), start - begin, min(stop, end) - begin)
            parts.append(self._global_index(members, rows))
            start, window = end, window + 1
        return np.concatenate(parts)

    def _windows(self, key: int) -> tuple[Indices, Indices]:
        """The permuted blocks, and the position after each window's last row; kept for the newest epoch."""
        if self._newest is None or self._newest[0] != key:
            blocks = permuted(len(self._sizes), derive_seed(key, _BLOCKS), 0, len(self._sizes))
            ends = np.cumsum(self._sizes[blocks])
            last = np.arange(self._window_blocks, len(blocks) + self._window_blocks, self._window_blocks) - 1
            self._newest = key, blocks, ends[np.minimum(last, len(blocks) - 1)]
        return self._newest[1:]

    def _global_index(self, members: Indices, rows: Indices) -> Indices:
        """Dataset indices of rows that are counted through the given blocks, one after the other."""
        ends = np.cumsum(self._sizes[members])
        which = np.searchsorted(ends, rows, side="right")
        before = ends - self._sizes[members]
        shifted: Indices = rows - before[which] + self._starts[members][which]
        return shifted


@lru_cache(maxsize=4)
def _sorted_permutation(size: int, key: int) -> Indices:
    """Sort random keys that carry their index in the low bits; at most 2**20 indices leave 44 random bits."""
    index_bits = np.uint64(max(size - 1, 1).bit_length())
    index = np.arange(size, dtype=np.uint64)
    keys = splitmix(index, key) >> index_bits << index_bits | index
    keys.sort()
    keys &= (np.uint64(1) << index_bits) - np.uint64(1)
    return keys.view(np.int64)


def _feistel_permutation(size: int, key: int, positions: Words) -> Indices:
    """Encrypt positions with a Feistel network over ``range(size)``.

    Follows Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5 (generalised Feistel on
    Z_a x Z_b) and section 3 (cycle walking). With a*b barely above ``size``, hardly any position walks.
    """
    left_size = np.uint64(isqrt(size - 1) + 1)
    right_size = np.uint64(-(-size // int(left_size)))
    round_keys = [derive_seed(key, turn) for turn in range(_FEISTEL_ROUNDS)]
    result = _feistel(positions, left_size, right_size, round_keys)
    walking = np.flatnonzero(result >= size)
    while walking.size:
        result[walking] = _feistel(result[walking], left_size, right_size, round_keys)
        walking = walking[result[walking] >= size]
    return result.view(np.int64)


def _feistel(values: Words, left_size: np.uint64, right_size: np.uint64, round_keys: list[int]) -> Words:
    left, right = values % left_size, values // left_size
    for turn, key in enumerate(round_keys):
        if turn % 2:
            left = (left + splitmix(right, key) % left_size) % left_size
        else:
            right = (right + splitmix(left, key) % right_size) % right_size
    return left + right * left_size


def splitmix(values: Words, key: int) -> Words:
    """Element ``i`` of the SplitMix64 stream that starts at ``key``, for each value ``i``."""
    mixed = values * np.uint64(0x9E37_79B9_7F4A_7C15) + np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58_476D_1CE4_E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D0_49BB_1331_11EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
