"""``ray-trainer export``: the weights alone, as one safetensors file."""

import argparse

from ray_trainer.checkpoint import export_weights
from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.places import open_run
from ray_trainer.errors import ConfigError


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``export``."""
    parser = add_command(
        subparsers,
        "export",
        help="write the weights of a checkpoint to one safetensors file",
        examples="""
            ray-trainer export runs/digits --output digits.safetensors
            ray-trainer export runs/digits --newest --output digits.safetensors
        """,
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN_DIR", help="a checkpoint, or a run directory")
    parser.add_argument("--output", metavar="FILE", required=True, help="the file, such as model.safetensors")
    parser.add_argument("--newest", action="store_true", help="the newest checkpoint of a run, not its best")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``export``.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: a file cannot be read or written.
    """
    try:
        open_run(args.source)
        export_weights(args.source, args.output, which="newest" if args.newest else "best")
    except OSError as error:
        raise ConfigError(f"{args.source} cannot be exported to {args.output!r}: {error}") from error
    print(args.output)
    return 0
