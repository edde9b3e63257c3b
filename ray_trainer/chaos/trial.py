"""A clean run and one under faults, by the same command in two directories, and what their comparison says."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ray_trainer.chaos.comparison import Comparison, compare_runs
from ray_trainer.chaos.driver import Driver
from ray_trainer.chaos.faults import Course, Fault, draw_faults
from ray_trainer.chaos.strikes import Strike, Striker
from ray_trainer.errors import ConfigError, RunError
from ray_trainer.storage import Storage
from ray_trainer.storage.lease import holding

CLEAN, STRUCK = "clean", "faults"


@dataclass(frozen=True)
class Verdict:
    """What a trial has shown.

    Attributes:
        clean_steps: of the clean run.
        clean_s: that it took.
        strikes: faults that happened, in their order.
        missed: faults for which the run was over too soon.
        comparison: of the two runs.
    """

    clean_steps: int
    clean_s: float
    strikes: tuple[Strike, ...]
    missed: tuple[Fault, ...]
    comparison: Comparison

    @property
    def is_proven(self) -> bool:
        """Whether every fault happened and changed nothing."""
        return self.comparison.is_equal and not self.missed

    @property
    def differs_before_faults(self) -> bool:
        """Whether the runs differ already where nothing had happened yet."""
        first = self.comparison.first_step
        return first is not None and all(first <= strike.step - strike.steps_repeated for strike in self.strikes)


@dataclass(frozen=True)
class Trial:
    """Both runs.

    Attributes:
        command: arguments of ``ray-trainer`` for the run with a name.
        place: the directory of both; made anew.
        kinds: of faults.
        num_faults: how many.
        seed: decides which, when and on whom.
        tell: is told of what happens.
    """

    command: Callable[[str], Sequence[str]]
    place: Storage
    kinds: Sequence[str]
    num_faults: int
    seed: int
    tell: Callable[[str], None]

    def carry_out(self) -> Verdict:
        """Run both, and compare.

        Raises:
            ConfigError: the place is somebody else's, or the run is too short.
            LeaseHeldError: the place is in use.
            RunError: a run failed, or a fault did not show.
        """
        with self._made_anew():
            course, clean_s = self._run_clean()
            faults = draw_faults(self._possible(course), self.num_faults, self.seed, course)
            strikes, missed = self._run_struck(faults, course)
            comparison = compare_runs(self.place.child(CLEAN), self.place.child(STRUCK))
        return Verdict(course.last_step, clean_s, tuple(strikes), tuple(missed), comparison)

    @contextmanager
    def _made_anew(self) -> Iterator[None]:
        """Own the place; runs of an earlier trial go."""
        strangers = [name for name in self.place.list() if name not in (CLEAN, STRUCK, ".lease")]
        if strangers:
            raise ConfigError(
                f"{self.place.uri} holds {strangers[0]!r}, so it is not from this command, which would delete what is "
                "there. Choose another cluster.name or cluster.storage_path."
            )
        with holding(self.place):
            for name in (CLEAN, STRUCK):
                run = self.place.child(name)
                if run.exists():
                    with holding(run):  # nobody is at work there
                        pass
                    run.delete()
            yield

    def _run_clean(self) -> tuple[Course, float]:
        run = self.place.child(CLEAN)
        began_s = time.monotonic()
        with Driver(self.command(CLEAN), run) as driver:
            self._finish(driver, "The clean run")
            steps = driver.steps()
            saved = sorted({int(row["step"]) for row in driver.events("checkpoint_saved")})
            num_workers = driver.num_workers()
        took_s = time.monotonic() - began_s
        times = sorted(row["time"] for row in steps)
        last_step = int(max((row["step"] for row in steps), default=0))
        if len(times) < 2:
            raise ConfigError(
                f"The run has {last_step} step(s), too few to disturb it. Make it longer (training.epochs)."
            )
        usual_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        self.tell(f"clean run: {last_step} steps on {num_workers} workers in {took_s:.1f} s")
        return Course(last_step, num_workers, usual_s, saved[1] if len(saved) > 2 else None), took_s

    def _possible(self, course: Course) -> list[str]:
        """The kinds, without that of damaged checkpoints where there is never one to spare."""
        if course.two_checkpoints_at is not None or "checkpoint" not in self.kinds:
            return list(self.kinds)
        rest = [kind for kind in self.kinds if kind != "checkpoint"]
        why = "the run saves too seldom for a checkpoint to be lost; set training.save_every_n_steps"
        if not rest:
            raise ConfigError(f"--kinds = checkpoint: {why}.")
        self.tell(f"no fault of the kind checkpoint: {why}")
        return rest

    def _run_struck(self, faults: Sequence[Fault], course: Course) -> tuple[list[Strike], list[Fault]]:
        run = self.place.child(STRUCK)
        strikes: list[Strike] = []
        missed: list[Fault] = []
        with Driver(self.command(STRUCK), run) as driver:
            striker = Striker(driver, run, self.seed)
            for fault in faults:
                strike = striker.carry_out(fault, course.step_s)
                if strike is None:
                    missed.append(fault)
                    self.tell(f"{fault}: the run was over before")
                else:
                    strikes.append(strike)
                    self.tell(f"{fault} at step {strike.step}: {strike.answer}, after {strike.seconds_lost:.1f} s")
            self._finish(driver, "The run under faults")
        return strikes, missed

    def _finish(self, driver: Driver, name: str) -> None:
        code = driver.wait()
        if code != 0:
            raise RunError(f"{name} ended with exit code {code}:\n{driver.told()}")
