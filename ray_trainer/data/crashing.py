"""Samples that training cannot get over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ray_trainer.data.deal import Share
from ray_trainer.data.order import Indices


@dataclass(frozen=True)
class CrashingSamples:
    """Samples that are not used any more.

    Attributes:
        epoch: from which on.
        step_in_epoch: steps of that epoch that were completed before.
        rows: which, ascending.
    """

    epoch: int
    step_in_epoch: int
    rows: Indices


def without(
    shares: Iterator[Share], crashing: Sequence[CrashingSamples], epoch: int, start: int, num_rows: int
) -> Iterator[Share]:
    """What is dealt out to a rank, without such samples; all others keep their places.

    Args:
        shares: from a step of the epoch on.
        crashing: may be empty, and then costs nothing.
        epoch: counted from 0.
        start: the first of the steps.
        num_rows: of the dataset; a sample that is used stands in where a rank has none left.
    """
    if not crashing:
        return shares
    return _without(shares, crashing, epoch, start, num_rows)


def _without(
    shares: Iterator[Share], crashing: Sequence[CrashingSamples], epoch: int, start: int, num_rows: int
) -> Iterator[Share]:
    for step, share in zip(count(start), shares, strict=False):
        rows = [found.rows for found in crashing if (found.epoch, found.step_in_epoch) <= (epoch, step)]
        if not rows or not np.isin(np.concatenate(share.micro_batches), np.concatenate(rows)).any():
            yield share
            continue
        gone = np.unique(np.concatenate(rows))
        kept = [indices[~np.isin(indices, gone)] for indices in share.micro_batches]
        left = [indices for indices in kept if len(indices)]
        places = tuple(place for place, indices in zip(share.places, kept, strict=False) if len(indices))
        num_left = sum(len(indices) for indices in left) if share.num_samples else 0
        yield Share(left, num_left, places) if num_left else Share([_first_besides(gone, num_rows)], 0)


def _first_besides(gone: Indices, num_rows: int) -> Indices:
    """A sample that is used."""
    return np.setdiff1d(np.arange(min(num_rows, len(gone) + 1), dtype=np.int64), gone)[:1]
