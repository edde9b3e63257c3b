"""How much of its time a cluster that fails now and then spends on training: simulated failure by failure."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_FAILURES = 4000  # simulated for each interval: the goodput is then right to about a thousandth
_STEP = 1.1  # between two intervals that are tried


@dataclass(frozen=True)
class Prospect:
    """What is known of a cluster and of the checkpoints of a run; seconds.

    Attributes:
        mtbf_s: mean time between failures of the whole cluster. Failures come independently of each other, also
            while it recovers.
        stall_s: training stands still for a checkpoint.
        durable_s: from the start of a checkpoint until one may rely on it; at least the stall. The next one
            begins later.
        recovery_s: from a failure until training goes on where the checkpoint was.
    """

    mtbf_s: float
    stall_s: float
    durable_s: float
    recovery_s: float

    @property
    def young_daly_s(self) -> float:
        """The best interval by Young (1974): right where checkpoints are short against the time between failures."""
        return math.sqrt(2 * self.stall_s * self.mtbf_s)

    @property
    def shortest_interval_s(self) -> float:
        """Training between two checkpoints that follow each other as closely as they can."""
        return max(self.durable_s - self.stall_s, self.mtbf_s * 1e-6)


@dataclass(frozen=True)
class Outcome:
    """Shares of the time, which add up to 1, with a checkpoint after each ``interval_s`` seconds of training.

    Attributes:
        interval_s: seconds of training between two checkpoints.
        goodput: in steps that count.
        checkpoints: waiting for checkpoints that were relied on later.
        repeated: in what was lost with a failure: steps that are done again, and checkpoints within them.
        down: recovering.
    """

    interval_s: float
    goodput: float
    checkpoints: float
    repeated: float
    down: float


def simulate(prospect: Prospect, interval_s: float, seed: int, num_failures: int = _NUM_FAILURES) -> Outcome:
    """Live through many failures.

    Args:
        prospect: the cluster.
        interval_s: seconds of training between two checkpoints.
        seed: the same one brings the same failures, whatever the interval.
        num_failures: more of them make it more exact.
    """
    draw = random.Random(seed)
    cycle_s = interval_s + prospect.stall_s
    writing_s = max(0.0, prospect.durable_s - prospect.stall_s)  # beside training
    trained_s = stalled_s = repeated_s = down_s = 0.0
    for _ in range(num_failures):
        up_s = draw.expovariate(1 / prospect.mtbf_s)
        kept = max(0, math.floor((up_s - writing_s) / cycle_s))  # checkpoints that can be relied on
        trained_s += kept * interval_s
        stalled_s += kept * prospect.stall_s
        repeated_s += up_s - kept * cycle_s
        down_s += _recovery(prospect, draw)
    total_s = trained_s + stalled_s + repeated_s + down_s
    return Outcome(interval_s, trained_s / total_s, stalled_s / total_s, repeated_s / total_s, down_s / total_s)


def best_outcome(prospect: Prospect, seed: int) -> Outcome:
    """That of the interval with the highest goodput, of those in steps of a tenth."""
    longest_s = max(10 * prospect.mtbf_s, prospect.shortest_interval_s)
    count = math.floor(math.log(longest_s / prospect.shortest_interval_s, _STEP)) + 1
    intervals = [prospect.shortest_interval_s * _STEP**place for place in range(count)]
    return _best(prospect, intervals, seed)


def _best(prospect: Prospect, intervals: Sequence[float], seed: int) -> Outcome:
    """The top of a curve that rises and falls once: looked for among few failures, then measured among many."""
    rough = [simulate(prospect, interval, seed, _NUM_FAILURES // 4) for interval in intervals]
    top = max(range(len(rough)), key=lambda place: rough[place].goodput)
    near = intervals[max(0, top - 3) : top + 4]
    return max((simulate(prospect, interval, seed) for interval in near), key=lambda outcome: outcome.goodput)


def _recovery(prospect: Prospect, draw: random.Random) -> float:
    """How long it takes to come back; a failure on the way begins it anew."""
    spent_s = 0.0
    for _ in range(1000):  # beyond that it practically never comes back
        next_s = draw.expovariate(1 / prospect.mtbf_s)
        if next_s >= prospect.recovery_s:
            return spent_s + prospect.recovery_s
        spent_s += next_s
    return spent_s
