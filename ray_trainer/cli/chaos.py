"""``ray-trainer chaos``: whether faults change the result of an experiment, found out on that experiment."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ray_trainer.chaos import KINDS, Trial, Verdict
from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.experiment import load_experiment
from ray_trainer.cli.output import print_json, print_line, print_table
from ray_trainer.cli.runfile import RunFile, load_run_file, resolved
from ray_trainer.cli.surroundings import in_ray_job
from ray_trainer.config.documents import dump_yaml
from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage

_EXIT_EQUAL, _EXIT_NOT_PROVEN, _EXIT_TERMINATED = 0, 1, 143
_DIFFERENCES_SHOWN = 5
_EXAMPLES = """
ray-trainer chaos examples/digits.yaml
ray-trainer chaos examples/digits.yaml training.epochs=4 --faults 10 --seed 7
ray-trainer chaos examples/digits.yaml --kinds worker,driver
"""


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``chaos``."""
    parser = add_command(
        subparsers,
        "chaos",
        help="prove on an experiment that faults do not change its result, to the bit",
        examples=_EXAMPLES,
        usage="RUN.yaml [--faults N] [--seed S] [--kinds KIND,...] [--json] [--dry-run] [section.key=value ...]",
    )
    parser.description = (
        "Trains twice on this machine, with a Ray of its own: once undisturbed, and once while processes are killed\n"
        "and stopped from outside, and the newest checkpoint is damaged. Then it compares weights, optimizer, all\n"
        "other state and every row of metrics, bit for bit.\n\n"
        "Both runs lie in STORAGE_PATH/NAME-chaos, as 'clean' and 'faults'; given again, the command deletes them and\n"
        "starts over. The run NAME itself is not touched. Ends with 0 if all is equal, 1 if not or if a run failed.\n\n"
        "kinds of faults:\n" + "\n".join(f"  {kind:<12}{what}" for kind, what in KINDS.items())
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument("--faults", metavar="N", type=int, default=len(KINDS), help="how many (default %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="which, when and on whom (default 0)")
    parser.add_argument("--kinds", metavar="KIND,...", help="only these kinds of faults; all by default")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and the kinds; start nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``chaos``.

    Raises:
        ConfigError: the run file, the experiment or an option is wrong, or faults can't be had there.
        LeaseHeldError: another one is at work in the same place.
        RunError: a run failed.
    """
    run_file = load_run_file(args.run_file, args.overrides)
    kinds = _kinds(args.kinds, run_file)
    _require_a_fair_trial(run_file, args.faults)
    load_experiment(run_file.experiment, args.run_file.parent)
    name = f"{run_file.cluster.name or args.run_file.stem}-chaos"
    if args.dry_run:
        cluster = replace(run_file.cluster, name=name)
        print(dump_yaml(resolved(replace(run_file, cluster=cluster))), end="")
        print(f"# {args.faults} faults of the kinds {', '.join(kinds)}, drawn with the seed {args.seed}")
        return _EXIT_EQUAL
    place = Storage.open(run_file.cluster.storage_path).child(name)

    def command(own_name: str) -> list[str]:
        own = {
            "cluster.storage_path": f"{run_file.cluster.storage_path.rstrip('/')}/{name}",
            "cluster.name": own_name,
            "training.log_every_n_steps": 1,  # so that each step is compared, and seen when it is completed
        }
        settings = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        return ["train", os.fspath(args.run_file), *args.overrides, *settings]

    with _ended_by_sigterm():
        verdict = Trial(
            command, place, kinds, args.faults, args.seed, tell=lambda text: print(text, file=sys.stderr, flush=True)
        ).carry_out()
    if args.json:
        _print_json(verdict, place.uri)
    else:
        _print(verdict, place.uri)
    return _EXIT_EQUAL if verdict.is_proven else _EXIT_NOT_PROVEN


def _kinds(given: str | None, run_file: RunFile) -> list[str]:
    """What is asked for; by default all that this run can have.

    Raises:
        ConfigError: there is no such kind, or the run can't have it.
    """
    watched = run_file.cluster.hang_floor_s is not None
    if given is None:
        return [kind for kind in KINDS if kind != "stop" or watched]
    kinds = list(dict.fromkeys(kind.strip() for kind in given.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds = {given!r}: there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}.")
    if "stop" in kinds and not watched:
        raise ConfigError("--kinds: nobody finds a worker that is stopped while cluster.hang_floor_s is null; set it.")
    return kinds


def _require_a_fair_trial(run_file: RunFile, num_faults: int) -> None:
    """Refuse where faults can't be had, or where time decides about the result.

    Raises:
        ConfigError: with every reason.
    """
    reasons = []
    if num_faults < 1:
        reasons.append(f"--faults = {num_faults}: at least 1.")
    if run_file.cluster.address is not None or in_ray_job():
        reasons.append(
            f"cluster.address = {run_file.cluster.address!r}: faults are signals to processes of this machine, and a "
            "cluster is not to be disturbed. Add cluster.address=null to train on a Ray of this machine."
        )
    if run_file.training.max_time is not None:
        reasons.append("training.max_time: a run that ends by the clock is never the same twice; set it to null.")
    if run_file.training.fast_dev_run:
        reasons.append("training.fast_dev_run: it saves nothing that could be compared; set it to false.")
    if not Path("/proc/self/stat").exists():
        reasons.append("Processes are found through /proc, which this system does not have: use Linux.")
    if reasons:
        raise ConfigError("\n".join(reasons))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this program as Ctrl-C does, so that the runs are ended with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(verdict: Verdict, place: str) -> None:
    rows: list[Sequence[str]] = [
        (
            str(strike.fault),
            str(strike.step),
            strike.answer,
            str(strike.steps_repeated),
            f"{strike.seconds_lost:.1f}",
        )
        for strike in verdict.strikes
    ]
    rows += [(str(fault), "-", "did not happen: the run was over", "-", "-") for fault in verdict.missed]
    print_table(("fault", "at step", "what the run did", "steps repeated", "seconds lost"), rows)
    print_line("")
    print_line(_judgement(verdict))
    for difference in verdict.comparison.differences[:_DIFFERENCES_SHOWN]:
        print_line(f"  {difference}")
    if len(verdict.comparison.differences) > _DIFFERENCES_SHOWN:
        print_line(f"  and {len(verdict.comparison.differences) - _DIFFERENCES_SHOWN} more differences")
    print_line(f"both runs {place}")


def _judgement(verdict: Verdict) -> str:
    comparison = verdict.comparison
    if comparison.differences:
        text = "NOT EQUAL, in the clean run and under faults:"
        if verdict.differs_before_faults:
            text = (
                "NOT EQUAL, and already before the first fault: the experiment itself gives another result each time. "
                "Look for randomness that is not torch's, numpy's or Python's own, for time or order of files in it, "
                "and try training.deterministic=true. In the clean run and under faults:"
            )
        return text
    text = (
        f"EQUAL to the bit after {verdict.clean_steps} steps: {comparison.num_tensors} tensors of model, optimizer and "
        f"all other state, and {comparison.num_rows} rows of metrics, each once"
    )
    if verdict.missed:
        return f"{text}. But {len(verdict.missed)} faults did not happen: make the run longer (training.epochs)"
    return f"{text}. {len(verdict.strikes)} of {len(verdict.strikes)} faults happened"


def _print_json(verdict: Verdict, place: str) -> None:
    print_json(
        {
            "equal": verdict.comparison.is_equal,
            "proven": verdict.is_proven,
            "clean_steps": verdict.clean_steps,
            "clean_s": round(verdict.clean_s, 3),
            "faults": [strike.to_dict() for strike in verdict.strikes],
            "missed": [str(fault) for fault in verdict.missed],
            "num_tensors": verdict.comparison.num_tensors,
            "num_rows": verdict.comparison.num_rows,
            "differences": list(verdict.comparison.differences),
            "runs": place,
        }
    )
