"""Where in a training who may be killed: every phase times every victim, and the same bits in the end.

Run it with ``python tests/chaos/kill_matrix.py [--cells PHASE:VICTIM ...]``; it takes a while, prints a line for
each death as it comes true, and the table at the end. A cell is a SIGKILL at just that point of the code, found by
a worker that is there (`matrix_experiment`). The cells of a victim strike one run after each other, each once the
run has got further than before. A run must end with the weights, the optimizer, all other state and the metrics of
an undisturbed one, to the bit, and each step of each rank must have been made of the same samples.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matrix_experiment
from cluster_runs import OUTLIVING, Command, training, whole_lines, write_run_file
from matrix_experiment import STEPS_AN_EPOCH

from ray_trainer.chaos import compare_runs
from ray_trainer.chaos.processes import identity, is_alive
from ray_trainer.errors import CheckpointError
from ray_trainer.storage import Storage

WORKERS = 3
PATIENCE_S = 240

#: Who kills whom: the rank that gets to the point, and whom its grave names.
VICTIMS = {
    "rank0": (0, "self"),
    "another": (1, "self"),
    "all": (0, "all"),
    "node": (1, "node"),
    "controller": (0, "controller"),
    "driver": (0, "driver"),
}
PHASES = {
    "fetch": "reading a sample",
    "forward": "forward pass",
    "accumulation": "second micro-batch of a step",
    "backward": "backward pass",
    "all_reduce": "in the all-reduce of gradients",
    "before_update": "before the optimizer's step",
    "after_update": "after it",
    "snapshot": "taking the state for a checkpoint",
    "writer": "a checkpoint is being written beside",
    "saved": "a checkpoint has just been reported",
    "retention": "an old checkpoint is being deleted",
    "validation": "validation",
    "epoch_end": "an epoch's edge",
    "restore": "loading the state after another death",
    "rejoin": "finding together after another death",
    "keep": "keeping the state after another death",
    "handover": "state being handed over after another death",
}
_AFTER_A_DEATH = ("restore", "rejoin", "keep", "handover")


@dataclass(frozen=True)
class Death:
    """One that came true.

    Attributes:
        went_on_after_s: from the kill to the first step that had not been done before.
        steps_repeated: those that had.
        way: how the run came back, as its events tell it.
    """

    phase: str
    victim: str
    step: int
    went_on_after_s: float
    steps_repeated: int
    way: str


class Run:
    """A run of the experiment in a directory of its own."""

    def __init__(self, directory: Path, epochs: int, address: str | None = None) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.graves = directory / "graves"
        self.graves.mkdir(parents=True)
        self.last_step = epochs * STEPS_AN_EPOCH
        self.run_file = write_run_file(
            directory / "run.yaml",
            experiment=f"{matrix_experiment.__file__}:experiment",
            model={"graves": str(self.graves), "run_dir": str(self.run_dir)},
            training={
                "epochs": epochs,
                "batch_size": 5,
                "gradient_accumulation_steps": 2,
                "log_every_n_steps": 1,
                "save_every_n_steps": 5,
                "keep_last_n": 2,
                "keep_best_k": 0,
                "tensorboard": False,
            },
            cluster={
                "num_workers": WORKERS,
                "resources_per_worker": {"CPU": 0.5} | ({"seat": 1} if address else {}),
                "name": "run",
                "storage_path": str(directory),
                "address": address,
            },
        )

    def undisturbed(self) -> "Run":
        """To the end."""
        with training(self.run_file) as command:
            assert command.wait() == 0, command.output
        return self

    def struck(self, cells: Sequence[tuple[str, str]], lost: "Losses | None" = None) -> Iterator[Death]:
        """To the end, with one death after the other.

        Args:
            cells: phases and victims.
            lost: where nodes are lost.
        """
        slow = self.graves / "slow"
        slow.touch()
        with ExitStack() as starts:
            command = starts.enter_context(training(self.run_file))
            command.wait_for_step(7)
            for phase, victim in cells:
                fired = self.dig(command, victim, phase)
                since = fired["time"]
                if victim == "driver":
                    assert command.wait() == -9, command.output
                    command.wait_until_nothing_is_left(but=OUTLIVING)  # its workers may go on for a moment
                    since = time.time()
                    command = starts.enter_context(training(self.run_file))
                if lost is not None:
                    lost.make_up()
                yield self.recovery(command, victim, phase, fired, since)
            slow.unlink()
            assert command.wait() == 0, command.output

    def dig(self, command: Command, victim: str, phase: str) -> dict[str, Any]:
        """Have a death come true; what is known of it."""
        killer, whom = VICTIMS[victim]
        deaths = [(phase, killer, whom)]
        if phase in _AFTER_A_DEATH:
            is_newcomer = (phase == "restore" and whom == "self") or (phase, victim) == ("handover", "another")
            first = killer if is_newcomer else 2  # rank 0 is then the one that hands its state over
            deaths.insert(0, ("forward", first, "self"))
        before = len(self.fired())
        command.look()
        for point, rank, content in reversed(deaths):
            (self.graves / "new").write_text(content)
            (self.graves / "new").rename(self.graves / f"{point}-rank{rank}")  # whole at once
        seen = command.until(lambda: self.fired()[before + len(deaths) - 1 :] or None, f"the death in {phase}")
        for pid in seen[-1]["pids"]:
            command.until(lambda pid=pid: not is_alive(identity(pid)) or None, "the end of a process")
        return seen[-1]

    def fired(self) -> list[dict[str, Any]]:
        return whole_lines(self.graves / "fired.jsonl")

    def recovery(self, command: Command, victim: str, phase: str, fired: dict[str, Any], since: float) -> Death:
        """Once the run has got further than before, with workers that started after a time."""
        completed: dict[int, float] = {}

        def back() -> float | None:
            for row in self.rows():  # until they are taken back, because they will be done again
                completed.setdefault(row["step"], row["time"])
            return next((row["time"] for row in self.events("workers_started", since)), None)

        back_at = command.until(back, "workers")
        done = max([step for step, time_s in completed.items() if time_s <= back_at] + [fired["step"]])

        def new() -> dict[str, Any] | None:
            return next((row for row in self.rows() if row["step"] > done and row["time"] > back_at), None)

        first = command.until(new, f"a step after {done}")
        resumed = self.events("resumed", since)
        repeated = done - min((row["step"] for row in resumed), default=0)
        way = "+".join(row["tier"] for row in resumed) or "from the beginning"
        return Death(phase, victim, fired["step"], first["time"] - fired["time"], max(0, repeated), way)

    def events(self, name: str, since: float) -> list[dict[str, Any]]:
        rows = whole_lines(self.run_dir / "events.jsonl")
        return [row for row in rows if row["event"] == name and row["time"] > since]

    def rows(self) -> list[dict[str, Any]]:
        return [row for row in whole_lines(self.run_dir / "metrics.jsonl") if row["split"] == "train"]

    def samples(self) -> dict[tuple[int, int], set[tuple[int, ...]]]:
        """Of what each step of each rank was made, as often as it was done."""
        found: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        for path in self.graves.glob("samples-rank*.jsonl"):
            for step, rank, world_size, samples in whole_lines(path):
                assert world_size == WORKERS
                found.setdefault((step, rank), set()).add(tuple(samples))
        return found

    def differences(self, whole: "Run") -> list[str]:
        """What is not as in the undisturbed run."""
        found = list(compare_runs(Storage.open(whole.run_dir), Storage.open(self.run_dir)).differences)
        mine, theirs = self.samples(), whole.samples()
        assert set(theirs) == {(step, rank) for step in range(1, self.last_step + 1) for rank in range(WORKERS)}
        died = {(death["step"] + 1, death["rank"]) for death in self.fired()}  # others may have completed that step
        for place, samples in theirs.items():
            if mine.get(place) != samples and not (place not in mine and place in died):
                found.append(f"rank {place[1]} made step {place[0]} of {mine.get(place)}, not of {samples}")
        found += [f"{path.name} was left over" for path in self.graves.glob("*-rank[0-9]")]
        return found


class Losses:
    """Nodes of a cluster, each with a seat for one worker; what is lost is made up for."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(WORKERS + 1):
            self.make_up()

    def make_up(self) -> None:
        """Add a node."""
        self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000, resources={"seat": 1})

    @property
    def address(self) -> str:
        return str(self.cluster.address)


@contextmanager
def nodes_that_may_be_lost() -> Iterator[Losses]:
    losses = Losses()
    try:
        yield losses
    finally:
        losses.cluster.shutdown()


def column(directory: Path, victim: str, phases: Sequence[str], whole: Run, epochs: int) -> dict[str, str]:
    """What became of each cell of a victim."""
    cells = dict.fromkeys(phases, "not reached")
    with ExitStack() as stack:
        lost = stack.enter_context(nodes_that_may_be_lost()) if victim == "node" else None
        run = Run(directory / victim, epochs, lost.address if lost else None)
        try:
            for death in run.struck([(phase, victim) for phase in phases], lost):
                cells[death.phase] = f"{death.went_on_after_s:.1f} s, {death.steps_repeated}, {death.way}"
                print(f"{death.phase} x {victim} at step {death.step}: {cells[death.phase]}", flush=True)
        except AssertionError as error:
            print(f"{victim}: {str(error)[-3000:]}", flush=True)
            reached = next((phase for phase, cell in cells.items() if cell == "not reached"), phases[-1])
            return cells | {reached: "FAILED"}
        try:
            differences = run.differences(whole)
        except CheckpointError as error:
            differences = [str(error)]
    for difference in differences[:5]:
        print(f"{victim}: {difference}", flush=True)
    return {phase: f"{'DIFFERS' if differences else 'equal'}: {cell}" for phase, cell in cells.items()}


def main() -> int:
    """Carry the cells out and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", metavar="PHASE:VICTIM", help="only these; a part may be empty")
    parser.add_argument(
        "--epochs", type=int, default=60, help=f"of {STEPS_AN_EPOCH} steps; more where cells are missed"
    )
    parser.add_argument("--directory", help="where the runs stay, to look at; an empty one")
    arguments = parser.parse_args()
    cells = [(phase, victim) for victim in VICTIMS for phase in PHASES]
    if arguments.cells:
        chosen = {tuple(cell.split(":")) for cell in arguments.cells}
        cells = [(phase, victim) for phase, victim in cells if chosen & {(phase, victim), ("", victim), (phase, "")}]
    found: dict[tuple[str, str], str] = {}
    with ExitStack() as stack:
        name = arguments.directory or stack.enter_context(tempfile.TemporaryDirectory())
        whole = Run(Path(name, "whole"), arguments.epochs).undisturbed()
        for victim in dict.fromkeys(victim for _, victim in cells):
            phases = [phase for phase, own in cells if own == victim]
            outcomes = column(Path(name), victim, phases, whole, arguments.epochs)
            found |= {(phase, victim): outcome for phase, outcome in outcomes.items()}
    print("\nseconds to the first new step, steps repeated, where the state came from")
    for (phase, victim), outcome in found.items():
        print(f"{phase:14}{victim:12}{outcome}")
    num_equal = sum(outcome.startswith("equal") for outcome in found.values())
    print(f"{num_equal} of {len(found)} cells equal to the undisturbed run, to the bit")
    return 0 if num_equal == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
