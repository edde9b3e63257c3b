"""``ray-trainer new``: a commented experiment and run file to start from, which run as they are."""

import argparse
import re
from importlib import resources
from pathlib import Path

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.errors import ConfigError

FILES = ("experiment.py", "run.yaml")
_NAME = "name: NAME"


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``new``."""
    parser = add_command(
        subparsers,
        "new",
        help="write an experiment and a run file to start from; nothing is overwritten",
        examples="ray-trainer new my_run\nray-trainer train my_run/run.yaml",
    )
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where to; made if it is not there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``new``.

    Raises:
        ConfigError: a file is there already, or cannot be written.
    """
    directory: Path = args.directory
    there = [str(directory / name) for name in FILES if (directory / name).exists()]
    if there:
        raise ConfigError(f"{', '.join(there)}: there already, and not overwritten. Name another directory.")
    name = re.sub(r"[^\w.-]+", "-", directory.resolve().name).lstrip(".-") or "run"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            text = (resources.files("ray_trainer.cli") / "starter" / file).read_text()
            with (directory / file).open("x") as target:  # not even if another process was faster
                target.write(text.replace(_NAME, f"name: {name}"))
            print(directory / file)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error}. Name a directory in which you may write."
        ) from error
    print(f"Train it: ray-trainer train {directory / 'run.yaml'}")
    return 0
