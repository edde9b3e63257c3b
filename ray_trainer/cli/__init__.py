"""The program ``ray-trainer``: one file a command, one place for exit codes."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ray_trainer.cli import (
    chaos,
    checkpoints,
    completion,
    config,
    doctor,
    export,
    new,
    plan,
    report,
    status,
    submit,
    sweep,
    train,
)
from ray_trainer.config.overrides import split_overrides
from ray_trainer.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DataError,
    RayTrainerError,
    StateMismatchError,
)

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 the run failed; 2 wrong usage, configuration or data, or such that the checkpoint can't go on with
        them; 130 interrupted. SIGTERM ends the program with 143 through `SystemExit`.
    """
    others, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not others:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    args, unknown = parser.parse_known_args(others)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. Settings are written section.key=value.")
    args.overrides = overrides
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args))
    except (ConfigError, DataError, CheckpointNotFoundError, StateMismatchError) as error:
        print(f"ray-trainer: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (RayTrainerError, OSError) as error:
        print(f"ray-trainer: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-trainer",
        description="Fault-tolerant training of PyTorch models on Ray clusters.",
        epilog="Settings of a run file are changed by section.key=value or --section.key value. Each command has a\n"
        "--help with examples.\n\nexample:\n  ray-trainer train examples/digits.yaml training.epochs=2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ray-trainer {version('ray-trainer')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, sweep, submit, status, report, chaos, checkpoints, export, config, plan, new, doctor):
        command.add_parser(subparsers)
    completion.add_parser(subparsers, _parser)
    return parser
