"""Carrying a fault out, proving that it happened, and reading off what the run made of it."""

import random
import signal
import time
from dataclasses import dataclass
from typing import Any

from ray_trainer.chaos.driver import Driver, RunIsOver
from ray_trainer.chaos.faults import Fault
from ray_trainer.chaos.processes import is_alive, is_stopped
from ray_trainer.checkpoint.catalog import list_checkpoints
from ray_trainer.checkpoint.layout import read_manifest
from ray_trainer.errors import RunError
from ray_trainer.narration import tell
from ray_trainer.storage import Storage

_STOPPED_EXIT = 143
#: The event in which a run itself tells of a fault.
_SIGNS = {
    "worker": "failure",
    "workers": "failure",
    "stop": "hang",
    "controller": "controller_lost",
    "driver": "workers_started",
    "terminate": "interrupted",
    "checkpoint": "checkpoint_rejected",
}


@dataclass(frozen=True)
class Strike:
    """A fault that happened.

    Attributes:
        fault: which.
        step: the last completed one when it struck.
        proof: how it is known that it happened.
        answer: what the run did.
        steps_repeated: that had been completed before.
        seconds_lost: until the first step that had not been.
    """

    fault: Fault
    step: int
    proof: str
    answer: str
    steps_repeated: int
    seconds_lost: float

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "kind": self.fault.kind,
            "rank": self.fault.rank if self.fault.kind in ("worker", "stop") else None,
            "planned_step": self.fault.step,
            "step": self.step,
            "proof": self.proof,
            "answer": self.answer,
            "steps_repeated": self.steps_repeated,
            "seconds_lost": round(self.seconds_lost, 3),
        }


class Striker:
    """Strikes one run.

    Args:
        driver: of the run.
        run: its directory.
        seed: of what is not said in a fault.
    """

    def __init__(self, driver: Driver, run: Storage, seed: int) -> None:
        self._driver = driver
        self._run = run
        self._draw = random.Random(seed)

    def carry_out(self, fault: Fault, step_s: float) -> Strike | None:
        """Wait for its moment, strike, and wait until training has got further than before.

        Args:
            fault: what to do.
            step_s: usual time of a step.

        Returns:
            None if the run was over before.

        Raises:
            RunError: the run failed, or does not tell of the fault.
        """
        strike = {
            "worker": self._kill_worker,
            "workers": self._kill_workers,
            "stop": self._stop_worker,
            "controller": self._kill_controller,
            "driver": self._kill_driver,
            "terminate": self._terminate,
            "checkpoint": self._damage_checkpoint,
        }[fault.kind]
        try:
            self._driver.until(lambda: self._is_time(fault), f"step {fault.step}")
            time.sleep(fault.part * step_s)
            at = time.time()
            proof = strike(fault)
            step, back_at = self._coming_back(fault, at)
            what = f"a step after {step}"
            went_on_at = self._driver.until(lambda: self._first_step_after(step, back_at), what)
        except RunIsOver:
            return None
        return Strike(
            fault,
            step,
            proof=f"{proof}; event {_SIGNS[fault.kind]}",
            answer=self._answer(at),
            steps_repeated=max(0, step - self._went_back_to(at)),
            seconds_lost=went_on_at - at,
        )

    def _is_time(self, fault: Fault) -> bool | None:
        is_ready = fault.kind != "checkpoint" or len(list_checkpoints(self._run)) > 1
        return True if self._driver.newest_step() >= fault.step and is_ready else None

    def _kill_worker(self, fault: Fault) -> str:
        process = self._driver.worker(fault.rank % self._driver.num_workers())
        self._driver.signal(process, signal.SIGKILL)
        self._driver.until(lambda: not is_alive(process) or None, "the end of a process")
        return f"process {process.pid} is gone"

    def _kill_workers(self, fault: Fault) -> str:
        processes = [self._driver.worker(rank) for rank in range(self._driver.num_workers())]
        for process in processes:
            self._driver.signal(process, signal.SIGKILL)
        self._driver.until(lambda: not any(map(is_alive, processes)) or None, "the end of processes")
        return f"processes {', '.join(str(process.pid) for process in processes)} are gone"

    def _stop_worker(self, fault: Fault) -> str:
        process = self._driver.worker(fault.rank % self._driver.num_workers())
        self._driver.signal(process, signal.SIGSTOP)
        self._driver.until(lambda: is_stopped(process) or not is_alive(process) or None, "the stop of a process")
        self._driver.until(lambda: not is_alive(process) or None, f"the end of process {process.pid}, which is stopped")
        return f"process {process.pid} was stopped, and ended by its monitor"

    def _kill_controller(self, fault: Fault) -> str:
        process = self._driver.controller()
        self._driver.signal(process, signal.SIGKILL)
        self._driver.until(lambda: not is_alive(process) or None, "the end of a process")
        return f"process {process.pid} is gone"

    def _kill_driver(self, fault: Fault) -> str:
        self._driver.send(signal.SIGKILL)
        return self._start_again(-signal.SIGKILL)

    def _terminate(self, fault: Fault) -> str:
        self._driver.send(signal.SIGTERM)
        return self._start_again(_STOPPED_EXIT)

    def _damage_checkpoint(self, fault: Fault) -> str:
        self._driver.kill_everything()  # a worker that is left behind might save once more
        name = list_checkpoints(self._run)[-1].name
        checkpoint = self._run.child(name)
        files = read_manifest(checkpoint).files
        file = self._draw.choice(sorted(name for name, entry in files.items() if entry.size))
        content = bytearray(checkpoint.read(file))
        content[self._draw.randrange(len(content))] ^= 1 << self._draw.randrange(8)
        checkpoint.write(file, bytes(content))
        self._driver.start()
        return f"{file} of {name} is damaged"

    def _start_again(self, expected: int) -> str:
        """The same command, once the last one has ended as it should."""
        code = self._driver.wait()
        if code == 0:
            raise RunIsOver
        if code != expected:
            raise RunError(f"The command ended with exit code {code}, not {expected}:\n{self._driver.told()}")
        self._driver.start()
        return f"the command ended with {code}"

    def _coming_back(self, fault: Fault, at: float) -> tuple[int, float]:
        """Wait until the workers are back and the run has told of the fault.

        Returns:
            The last step that was completed before, also by workers that got a little further; and when they were
            back.
        """
        completed: dict[int, float] = {}

        def look() -> float | None:
            for row in self._driver.steps():  # until they are taken back, because they will be done again
                completed.setdefault(row["step"], row["time"])
            back = self._driver.events("workers_started", "run_finished", since=at)
            has_told = self._driver.events(_SIGNS[fault.kind], since=at)
            return float(back[0]["time"]) if back and has_told else None

        back_at = self._driver.until(look, f"the event {_SIGNS[fault.kind]}, and workers")
        return max((step for step, time_s in completed.items() if time_s <= back_at), default=0), back_at

    def _first_step_after(self, step: int, back_at: float) -> float | None:
        """When the first step was completed that had not been before, or the run ended."""
        new = [row["time"] for row in self._driver.steps() if row["step"] > step and row["time"] > back_at]
        ends = [row["time"] for row in self._driver.events("run_finished", since=back_at - 1e-6)]
        return float(min([*new, *ends])) if new or ends else None

    def _answer(self, at: float) -> str:
        told = [text for event in self._driver.events("resumed", "rejoined", since=at) if (text := tell(event))]
        return told[-1] if told else "started again from the beginning: there was no checkpoint yet"

    def _went_back_to(self, at: float) -> int:
        started = self._driver.events("resumed", "workers_started", since=at)
        return int(min((row["step"] for row in started), default=0))
