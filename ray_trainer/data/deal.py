"""Which rank takes which samples at which step."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ray_trainer.data.batch import BatchPlan
from ray_trainer.data.order import Indices, SampleOrder
from ray_trainer.errors import DataError

_READ_ORDER_AHEAD = 16384


class Share(NamedTuple):
    """One rank's indices in a step, a micro-batch each, how many of them count, and see `StepBatch.places`."""

    micro_batches: list[Indices]
    num_samples: int
    places: tuple[int, ...] = ()


class Deal:
    """Deals the order of each epoch out: step ``t`` takes ``[t*G, (t+1)*G)`` of it, spread evenly over the ranks.

    Args:
        order: of the whole dataset.
        plan: who takes what.

    Attributes:
        num_samples: those of an epoch, over all ranks.

    Raises:
        DataError: ``drop_last`` leaves nothing.
    """

    def __init__(self, order: SampleOrder, plan: BatchPlan) -> None:
        self._order = order
        self._plan = plan
        self.num_samples = _samples_of_an_epoch(order.num_samples, plan)

    def num_steps(self) -> int:
        """Global batches of an epoch, a short last one included."""
        return -(-self.num_samples // self._plan.global_batch_size)

    def shares(self, epoch: int, start: int, announce: Callable[[Indices], None]) -> Iterator[Share]:
        """This rank's share of each step of an epoch.

        Args:
            epoch: counted from 0.
            start: the step to begin with.
            announce: is told what all ranks will read, some steps before it is dealt out.
        """
        ahead: deque[Indices] = deque()
        for chunk in self._chunks(epoch, start * self._plan.global_batch_size):
            announce(chunk)
            ahead.append(chunk)
            if len(ahead) == 2:
                yield from self._deal(ahead.popleft())
        for chunk in ahead:
            yield from self._deal(chunk)

    def _chunks(self, epoch: int, position: int) -> Iterator[Indices]:
        """The rest of the order, in pieces of whole global batches: a call costs more than a sample."""
        size = self._plan.global_batch_size
        length = max(1, _READ_ORDER_AHEAD // size) * size
        for begin in range(position, self.num_samples, length):
            yield self._order.indices(epoch, begin, min(begin + length, self.num_samples))

    def _deal(self, chunk: Indices) -> Iterator[Share]:
        size = self._plan.global_batch_size
        for begin in range(0, len(chunk), size):
            yield share_of(chunk[begin : begin + size], self._plan)


def share_of(global_batch: Indices, plan: BatchPlan) -> Share:
    """The rank's part, in micro-batches; a stand-in if there is none."""
    size = plan.batch_size
    if plan.deals_whole:
        first, last = _part(-(-len(global_batch) // size), plan)
        begin, end = first * size, min(last * size, len(global_batch))
        places = tuple(range(first, last))
    else:
        begin, end = _part(len(global_batch), plan)
        places = ()
    if begin >= end:
        return Share([global_batch[:1]], 0)
    return Share([global_batch[at : min(at + size, end)] for at in range(begin, end, size)], end - begin, places)


def _part(count: int, plan: BatchPlan) -> tuple[int, int]:
    """First and end of what the rank gets of ``count`` things, as `numpy.array_split` cuts them."""
    each, extra = divmod(count, plan.world_size)
    begin = plan.rank * each + min(plan.rank, extra)
    return begin, begin + each + (plan.rank < extra)


def _samples_of_an_epoch(available: int, plan: BatchPlan) -> int:
    used = available
    if plan.drop_last:
        used -= available % plan.global_batch_size
        if not used:
            raise DataError(
                f"The dataset has {available} samples, fewer than one global batch of "
                f"{plan.global_batch_size}, and drop_last leaves none. Use a smaller batch."
            )
    if plan.limit_batches is not None:
        used = min(used, plan.limit_batches * plan.batch_size * plan.world_size)
    return used
