"""``ray-trainer plan``: how much a cluster that fails will get done, and how often it should save."""

import argparse
import math
from dataclasses import asdict

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.outlook import Outcome, Prospect, best_outcome, simulate
from ray_trainer.cli.output import print_json, print_line, print_table, readable_age
from ray_trainer.errors import ConfigError

_DAY_S, _MINUTE_S = 86400.0, 60.0
_SHARES = ("goodput", "checkpoints", "repeated", "down")
_EXAMPLES = """
ray-trainer plan --nodes 128 --node-mtbf-days 300
ray-trainer plan --nodes 2048 --node-mtbf-days 264 --stall-s 2 --durable-s 60 --recovery-s 300
ray-trainer plan --nodes 16 --node-mtbf-days 30 --every-minutes 30 --json
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
        "--stall-s", metavar="S", type=float, default=1.0, help="a checkpoint stops training for so long (default 1)"
    )
    parser.add_argument(
        "--durable-s",
        metavar="S",
        type=float,
        help="from its start until it is safe; `checkpoint_saved` in events.jsonl tells both (default: the stall)",
    )
    parser.add_argument(
        "--recovery-s",
        metavar="S",
        type=float,
        default=60.0,
        help="from a failure until training goes on (default 60)",
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
        ConfigError: numbers that cannot be; lists all of them.
    """
    prospect = _prospect(args)
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


def _prospect(args: argparse.Namespace) -> Prospect:
    durable_s = args.stall_s if args.durable_s is None else args.durable_s
    wrong = [
        f"{name} = {value:g}: must be {'at least' if at_least else 'above'} {bound:g}"
        for name, value, bound, at_least in (
            ("--nodes", args.nodes, 1, True),
            ("--node-mtbf-days", args.node_mtbf_days, 0, False),
            ("--stall-s", args.stall_s, 0, False),
            ("--durable-s", durable_s, args.stall_s, True),
            ("--recovery-s", args.recovery_s, 0, True),
            ("--every-minutes", math.inf if args.every_minutes is None else args.every_minutes, 0, False),
        )
        if not (value >= bound if at_least else value > bound)  # so that NaN is refused as well
    ]
    wrong += [
        f"{name} = {value:g}: must be finite"
        for name, value in (
            ("--node-mtbf-days", args.node_mtbf_days),
            ("--stall-s", args.stall_s),
            ("--durable-s", durable_s),
            ("--recovery-s", args.recovery_s),
        )
        if math.isinf(value)
    ]
    if wrong:
        raise ConfigError("This cannot be planned:\n" + "\n".join(f"  - {line}" for line in wrong))
    return Prospect(args.node_mtbf_days * _DAY_S / args.nodes, args.stall_s, durable_s, args.recovery_s)


def _tell(prospect: Prospect, compared: list[Outcome]) -> None:
    print_line(f"a failure every {readable_age(prospect.mtbf_s)}")
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
