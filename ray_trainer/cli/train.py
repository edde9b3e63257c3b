"""``ray-trainer train``: train what a run file describes, or continue it."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.experiment import experiment_module, load_experiment, modules_beside
from ray_trainer.cli.output import keep_pipes_plain
from ray_trainer.cli.runfile import RunFile, load_run_file, resolved
from ray_trainer.cli.surroundings import in_ray_job, placed_in_job
from ray_trainer.config.documents import dump_yaml
from ray_trainer.metrics.terminal import LiveDisplay

_EXAMPLES = """
ray-trainer train examples/digits.yaml
ray-trainer train examples/digits.yaml training.epochs=2 cluster.name=short
ray-trainer train examples/digits.yaml --dry-run
"""


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``train``."""
    parser = add_command(
        subparsers,
        "train",
        help="train, or continue the run of that name",
        examples=_EXAMPLES,
        usage="RUN.yaml [--dry-run] [--take-over] [section.key=value ...]",
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved run and what it needs; start nothing"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="continue the run although another driver seems to be at work on it; that one can't save any more",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``train``.

    Raises:
        ConfigError: the run file or the experiment is wrong.
        DataError: the data cannot be trained on.
        LeaseHeldError: another driver is at work on the run.
        RunError: the run failed.
    """
    run_file = _with_name(load_run_file(args.run_file, args.overrides), args.run_file)
    if in_ray_job():
        run_file = placed_in_job(run_file)
    experiment = load_experiment(run_file.experiment, args.run_file.parent)
    if args.dry_run:
        return _dry_run(run_file)
    from ray import cloudpickle  # late: `config check` and --help start faster without Ray

    from ray_trainer.cluster import fit

    # workers elsewhere do not have the user's files, so what is in them travels with the run
    for module in modules_beside(experiment_module(run_file.experiment, args.run_file.parent), args.run_file.parent):
        cloudpickle.register_pickle_by_value(module)
    keep_pipes_plain()
    with LiveDisplay() as display:
        result = fit(
            experiment,
            run_file.training,
            run_file.cluster,
            run_file.model,
            display=display,
            take_over=args.take_over,
        )
    _summarise(result.results, result.run_dir)
    return 0


def _with_name(run_file: RunFile, path: Path) -> RunFile:
    """A run without a name takes the run file's, so that the same command continues it."""
    if run_file.cluster.name is not None:
        return run_file
    return replace(run_file, cluster=replace(run_file.cluster, name=path.stem))


def _dry_run(run_file: RunFile) -> int:
    from ray_trainer.cluster.session import resource_plan

    print(dump_yaml(resolved(run_file)), end="")
    print(f"# needs {resource_plan(run_file.cluster)}")
    return 0


def _summarise(results: dict[str, Any], run_dir: str) -> None:
    rows = results["metrics_summary"].to_dict("records")
    out = sys.stdout
    if rows:
        last = {name: value for name, value in rows[-1].items() if value == value}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "epoch")
        out.write(f"epoch {int(last['epoch'])}  {numbers}\n")
        out.write(f"best epoch {results['best_epoch']}\n")
    out.write(f"trained for {results['training_time']:.1f} s\n")
    out.write(f"best checkpoint {results['checkpoint_path']}\n")
    out.write(f"everything about the run {run_dir}\n")
