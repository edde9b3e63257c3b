"""What all ranks have to know of a step before it may change anything, in one small exchange."""

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from ray_trainer import distributed, pulse
from ray_trainer.checkpoint import Tier
from ray_trainer.runtime import Runtime, Stop
from ray_trainer.stragglers import Straggler, StragglerWatch


@dataclass(frozen=True)
class Agreed:
    """What the ranks told each other with a step; equal on all of them but for `stragglers`, which rank 0 knows.

    Attributes:
        count: by which the loss is weighted, of the global batch.
        num_samples: of the global batch.
        loss_sum: of the global batch; 0 where nobody asked for it.
        seconds: since the last step, on rank 0.
        stop: the wish to stop of any rank.
        wants_save: the surroundings of some rank want a checkpoint at once.
        may_grow: a process waits to be one more rank.
        busy: where a checkpoint of any rank is still on its way to.
        stragglers: ranks that were found to be slow.
        shared: sums over the ranks, in their order, of what else was told.
    """

    count: float = 0.0
    num_samples: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    stop: Stop = Stop.NONE
    wants_save: bool = False
    may_grow: bool = False
    busy: Tier = Tier.NONE
    stragglers: tuple[Straggler, ...] = ()
    shared: tuple[float, ...] = ()


class StepExchange:
    """Brings the ranks' columns together, a row a rank.

    Args:
        runtime: knows of wishes.
        saving_to: where a checkpoint of this rank is on its way to.
    """

    def __init__(self, runtime: Runtime, saving_to: Callable[[], Tier]) -> None:
        self._runtime = runtime
        self._saving_to = saving_to
        self._stragglers = StragglerWatch()
        self._clock = time.monotonic()

    def restart_clock(self) -> None:
        """Training starts now: set-up does not count as time of the first step."""
        self._clock = time.monotonic()

    def agree(self, count: float, num_samples: int, loss_sum: float, shared: Sequence[float] = ()) -> Agreed:
        """Tell this rank's part of the step, and learn the whole. Collective.

        Args:
            count: by which the loss of this rank is weighted.
            num_samples: of this rank.
            loss_sum: of this rank.
            shared: what else is to be added up; as many values on all ranks.
        """
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        stop, save, busy = self._runtime.requested_stop(), self._runtime.requested_save(), self._saving_to()
        grow = self._runtime.survivor is not None and self._runtime.survivor.may_grow
        if distributed.world_size() == 1:
            return Agreed(count, num_samples, loss_sum, seconds, stop, save, grow, busy, shared=tuple(shared))
        own = [count, num_samples, loss_sum, seconds, stop, save, grow, busy, *pulse.take_own_times(), *shared]
        rows = distributed.gather_rows(torch.tensor([own], dtype=torch.float64))[:, 0]
        counts, samples, losses, times, stops, saves, grows, tiers = rows[:, :8].T.tolist()
        end = rows.shape[1] - len(shared)
        slow = self._stragglers.add(rows[:, 8:end], times[0]) if distributed.rank() == 0 else []
        return Agreed(
            count=sum(counts),
            num_samples=int(sum(samples)),
            loss_sum=sum(losses),
            seconds=times[0],
            stop=Stop(int(max(stops))),
            wants_save=any(saves),
            may_grow=any(grows),
            busy=Tier(reduce(operator.or_, map(int, tiers))),
            stragglers=tuple(slow),
            shared=tuple(reduce(operator.add, column) for column in rows[:, end:].T.tolist()),
        )
