"""``ray-trainer sweep``: search for good settings, or continue a search."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.experiment import experiment_module, load_experiment, modules_beside
from ray_trainer.cli.output import keep_pipes_plain
from ray_trainer.cli.runfile import RunFile, load_run_file, resolved
from ray_trainer.cli.surroundings import in_ray_job, placed_in_job
from ray_trainer.cluster.trials import TrialRecord
from ray_trainer.config.documents import dump_yaml

_EXAMPLES = """
ray-trainer sweep examples/sweep.yaml
ray-trainer sweep examples/sweep.yaml sweep.num_samples=16 sweep.scheduler=none cluster.name=wide
ray-trainer sweep examples/sweep.yaml --dry-run
"""


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``sweep``."""
    parser = add_command(
        subparsers,
        "sweep",
        help="search for good settings, or continue the search of that name",
        examples=_EXAMPLES,
        usage="RUN.yaml [--dry-run] [--take-over] [section.key=value ...]",
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file; its section sweep says what")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved sweep and what a trial needs; start nothing"
    )
    parser.add_argument(
        "--take-over", action="store_true", help="continue although another driver seems to be at work on the sweep"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``sweep``.

    Raises:
        ConfigError: the run file or the experiment is wrong.
        DataError: the data cannot be trained on.
        LeaseHeldError: another driver is at work on the sweep.
        RunError: no trial has come to a result.
    """
    run_file = _with_name(load_run_file(args.run_file, args.overrides), args.run_file)
    if in_ray_job():
        run_file = placed_in_job(run_file)
    experiment = load_experiment(run_file.experiment, args.run_file.parent)
    if args.dry_run:
        return _dry_run(run_file)
    from ray import cloudpickle  # late, as in `train`

    from ray_trainer.cluster import sweep

    module = experiment_module(run_file.experiment, args.run_file.parent)
    for part in modules_beside(module, args.run_file.parent):
        cloudpickle.register_pickle_by_value(part)
    keep_pipes_plain()
    metric, mode = run_file.sweep.objective(run_file.training)
    with SweepTable(metric, mode) as table:
        result = sweep(
            experiment,
            run_file.training,
            run_file.cluster,
            run_file.sweep,
            run_file.model,
            display=table,
            reference=_from_anywhere(run_file.experiment, getattr(module, "__file__", None)),
            take_over=args.take_over,
        )
        table.update(result.trials)
    out = sys.stdout
    num_ended, num_trials = sum(trial.has_ended for trial in result.trials), run_file.sweep.num_trials()
    if num_ended < num_trials:
        out.write(
            f"out of time: {num_ended} of {num_trials} trials have ended; with more sweep.time_budget it goes on\n"
        )
    out.write(f"best {result.best.name}  {result.metric} {result.best.value:.6g}\n")
    out.write(f"its checkpoint {result.best.checkpoint}\n")
    out.write(f"train with its settings: ray-trainer train {result.run_file}\n")
    out.write(f"everything about the sweep {result.sweep_dir}\n")
    return 0


def _with_name(run_file: RunFile, path: Path) -> RunFile:
    """A sweep without a name takes the run file's, so that the same command continues it."""
    if run_file.cluster.name is not None:
        return run_file
    return replace(run_file, cluster=replace(run_file.cluster, name=f"{path.stem}-sweep"))


def _from_anywhere(reference: str, file: str | None) -> str:
    """The reference of an experiment in a form that does not depend on where the run file lies."""
    source, _, name = reference.rpartition(":")
    is_path = source.endswith(".py") or "/" in source
    return f"{Path(file).resolve()}:{name}" if is_path and file else reference


def _dry_run(run_file: RunFile) -> int:
    from ray_trainer.cluster.session import resource_plan

    print(dump_yaml(resolved(run_file)), end="")
    print(f"# {run_file.sweep.num_trials()} trials, each with {resource_plan(run_file.cluster)}")
    return 0


class SweepTable:
    """A table of the trials, redrawn in place on a terminal; elsewhere messages, and the table once at the end."""

    def __init__(self, metric: str, mode: str, stream: TextIO | None = None) -> None:
        """Show nothing yet.

        Args:
            metric: compares trials.
            mode: min or max; told in the head of its column.
            stream: standard output by default.
        """
        from rich.console import Console
        from rich.live import Live

        self._stream = stream or sys.stdout
        self._metric, self._mode = metric, mode
        is_terminal = self._stream.isatty()
        self._console = Console(
            file=self._stream, highlight=False, markup=False, emoji=False, width=None if is_terminal else 160
        )
        self._live = Live(console=self._console, refresh_per_second=2, transient=True) if is_terminal else None
        self._trials: list[TrialRecord] = []

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table behind."""
        if self._live is not None:
            self._live.stop()
        if self._trials:
            self._console.print(self._table(self._trials))

    def update(self, trials: Sequence[TrialRecord]) -> None:
        """The trials as they are now, the best first."""
        self._trials = list(trials)
        if self._live is not None:
            self._live.update(self._table(self._trials))

    def message(self, text: str) -> None:
        """Show something that happened; it stays."""
        if self._live is not None:
            self._live.console.print(text)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _table(self, trials: Sequence[TrialRecord]) -> Any:
        from rich.table import Table

        names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
        table = Table(box=None, pad_edge=False)
        for head in ("trial", "status", f"{self._metric} ({self._mode})", "epoch", "step"):
            table.add_column(head, no_wrap=True)
        for name in names:
            table.add_column(name)
        for trial in trials:
            step = max(trial.step, int(trial.live.get("step", 0))) if trial.status == "running" else trial.step
            settings = [_text(trial.settings.get(name)) for name in names]
            table.add_row(
                trial.name, trial.status, _text(trial.value), str(trial.epoch + 1 if step else 0), str(step), *settings
            )
        return table


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
