"""Which faults strike a run and when: drawn from a seed, spread over the steps of the clean run."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ray_trainer.errors import ConfigError

#: What each kind of fault is.
KINDS = {
    "worker": "SIGKILL of one worker, rank 0 as any other",
    "workers": "SIGKILL of all workers at once",
    "stop": "SIGSTOP of one worker, which its monitor has to find",
    "controller": "SIGKILL of Ray's controller of the run",
    "driver": "SIGKILL of the driver, then the same command again",
    "terminate": "SIGTERM to the driver, then the same command again",
    "checkpoint": "SIGKILL of every process and one bit of the newest checkpoint flipped, then the same command again",
}


@dataclass(frozen=True)
class Fault:
    """One fault that is to come.

    Attributes:
        kind: a key of `KINDS`.
        step: once so many steps are completed.
        part: how much of a step more, 0..1, so that any phase of a step may be struck.
        rank: whom it strikes, where it strikes one worker.
    """

    kind: str
    step: int
    part: float
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} (rank {self.rank})" if self.kind in ("worker", "stop") else self.kind


@dataclass(frozen=True)
class Course:
    """What the clean run was like.

    Attributes:
        last_step: of the run.
        num_workers: that it started with.
        step_s: usual time of a step.
        two_checkpoints_at: the step from which on a checkpoint could be lost; None if there never were two.
    """

    last_step: int
    num_workers: int
    step_s: float
    two_checkpoints_at: int | None


def draw_faults(kinds: Sequence[str], count: int, seed: int, course: Course) -> list[Fault]:
    """So many faults in the order in which they strike; each kind once before one comes again.

    Raises:
        ConfigError: the run is too short for them.
    """
    latest = course.last_step * 9 // 10  # the last steps may be over before anybody sees them
    if latest < count:
        raise ConfigError(
            f"--faults = {count}: the run has only {course.last_step} steps, too few for so many faults. Make it "
            f"longer (training.epochs), or ask for at most {latest}."
        )
    draw = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(kinds, len(kinds))
    edges = [1 + latest * number // count for number in range(count + 1)]
    steps = [draw.randrange(low, high) for low, high in itertools.pairwise(edges)]
    faults = []
    for kind, step in zip(chosen, steps, strict=False):
        at = max(step, course.two_checkpoints_at or 0) if kind == "checkpoint" else step
        faults.append(Fault(kind, at, draw.random(), draw.randrange(course.num_workers)))
    return sorted(faults, key=lambda fault: fault.step)
