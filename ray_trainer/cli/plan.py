"""``ray-trainer plan``: how much a cluster that fails will get done, and how often it should save."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.outlook import Outcome, Prospect, best_outcome, simulate
from ray_trainer.cli.output import print_json, print_line, print_table
from ray_trainer.cli.places import open_run
from ray_trainer.errors import ConfigError
from ray_trainer.metrics import read_events
from ray_trainer.metrics.goodput import goodput
from ray_trainer.report.units import readable_age

_DAY_S, _MINUTE_S = 86400.0, 60.0
_STALL_S, _RECOVERY_S = 1.0, 60.0  # where nothing is said or measured
_SHARES = ("goodput", "checkpoints", "repeated", "down")
_EXAMPLES = """
ray-trainer plan --nodes 128 --node-mtbf-days 300
ray-trainer plan --nodes 2048 --node-mtbf-days 264 --stall-s 2 --durable-s 60 --recovery-s 300
ray-trainer plan --nodes 16 --node-mtbf-days 30 --every-minutes 30 --json
ray-trainer plan --nodes 128 --node-mtbf-days 300 --like runs/digits
"""


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``plan``."""
    parser = add_command(
        subparsers,
        "plan",
        help="expected goodput and best checkpoint interval for a cluster and its rate of failures, by simulation",
        examples=_EXAMPLES,
    )
    parser.add_argument("--nodes", metavar="N", type=int, required=True, help="nodes that train together")
    parser.add_argument(
        "--node-mtbf-days", metavar="D", type=float, required=True, help="mean time between failures of one node"
    )
    parser.add_argument(
        "--like", metavar="RUN_DIR", help="a run in which the next three were measured; those that are given win"
    )
    parser.add_argument(
        "--stall-s", metavar="S", type=float, help=f"a checkpoint stops training for so long (default {_STALL_S:g})"
    )
    parser.add_argument(
        "--durable-s", metavar="S", type=float, help="from a checkpoint's start until it is safe (default: the stall)"
    )
    parser.add_argument(
        "--recovery-s",
        metavar="S",
        type=float,
        help=f"from a failure until training goes on (default {_RECOVERY_S:g})",
    )
    parser.add_argument(
        "--every-minutes", metavar="M", type=float, help="an interval of your own, to compare with the best one"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the failures that are drawn (default 0)")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``plan``.

    Raises:
        ConfigError: numbers that cannot be, all of them at once; or nothing was measured in the run to follow.
    """
    measured = {} if args.like is None else _measured(args.like)
    given = {name: getattr(args, name) for name in ("stall_s", "durable_s", "recovery_s")}
    prospect = _prospect(args, measured | {name: value for name, value in given.items() if value is not None})
    best = best_outcome(prospect, args.seed)
    compared = [best]
    if args.every_minutes is not None:
        interval_s = max(args.every_minutes * _MINUTE_S, prospect.shortest_interval_s)
        compared.append(simulate(prospect, interval_s, args.seed))
    if args.json:
        names = ("best", "every_minutes")
        outcomes = {name: asdict(outcome) for name, outcome in zip(names, compared, strict=False)}
        print_json({"mtbf_s": prospect.mtbf_s, "young_daly_s": prospect.young_daly_s, **outcomes})
    else:
        _tell(prospect, compared)
    return 0


def _measured(run_dir: str) -> dict[str, float]:
    """What the checkpoints of a run took, and its recoveries where it had any; means, in seconds."""
    events = read_events(open_run(run_dir))
    saved = [event for event in events if event["event"] == "checkpoint_saved"]
    if not saved:
        raise ConfigError(f"--like = {run_dir!r}: there is no checkpoint in the events of this run. Name another one.")
    stall_s, durable_s = (fmean(float(event[name]) for event in saved) for name in ("stall_s", "durable_s"))
    measured = {"stall_s": stall_s, "durable_s": max(stall_s, durable_s)}
    num_failures = sum(event["event"] == "failure" for event in events)
    return measured | ({"recovery_s": goodput(events).down_s / num_failures} if num_failures else {})


def _prospect(args: argparse.Namespace, known: Mapping[str, float]) -> Prospect:
    stall_s, recovery_s = known.get("stall_s", _STALL_S), known.get("recovery_s", _RECOVERY_S)
    durable_s = known.get("durable_s", stall_s)
    wrong = [
        f"{name} = {value:g}: must be {'at least' if at_least else 'above'} {bound:g}"
        for name, value, bound, at_least in (
            ("--nodes", args.nodes, 1, True),
            ("--node-mtbf-days", args.node_mtbf_days, 0, False),
            ("--stall-s", stall_s, 0, False),
            ("--durable-s", durable_s, stall_s, True),
            ("--recovery-s", recovery_s, 0, True),
            ("--every-minutes", math.inf if args.every_minutes is None else args.every_minutes, 0, False),
        )
        if not (value >= bound if at_least else value > bound)  # so that NaN is refused as well
    ]
    wrong += [
        f"{name} = {value:g}: must be finite"
        for name, value in (
            ("--node-mtbf-days", args.node_mtbf_days),
            ("--stall-s", stall_s),
            ("--durable-s", durable_s),
            ("--recovery-s", recovery_s),
        )
        if math.isinf(value)
    ]
    if wrong:
        raise ConfigError("This cannot be planned:\n" + "\n".join(f"  - {line}" for line in wrong))
    return Prospect(args.node_mtbf_days * _DAY_S / args.nodes, stall_s, durable_s, recovery_s)


def _tell(prospect: Prospect, compared: list[Outcome]) -> None:
    print_line(
        f"a failure every {readable_age(prospect.mtbf_s)}; a checkpoint stops training for {prospect.stall_s:.3g} s "
        f"and is safe after {prospect.durable_s:.3g} s; recovery takes {prospect.recovery_s:.3g} s"
    )
    print_line(
        f"best interval {readable_age(compared[0].interval_s)} (Young/Daly: {readable_age(prospect.young_daly_s)})"
    )
    print_line("")
    print_table(
        ("a checkpoint every", *_SHARES),
        [
            [readable_age(outcome.interval_s), *(f"{getattr(outcome, share):.2%}" for share in _SHARES)]
            for outcome in compared
        ],
    )
    print_line("")
    print_line(f"in the run file: save_every_minutes: {compared[0].interval_s / _MINUTE_S:.3g}")
