"""``ray-trainer report``: a run as one self-contained page."""

import argparse
import time
from pathlib import Path

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.places import open_run
from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage

_NAME = "report.html"


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``report``."""
    parser = add_command(
        subparsers,
        "report",
        help="write a page of a run, also of one in progress: curves, speed, failures and recoveries, goodput",
        examples="ray-trainer report runs/digits\nray-trainer report s3://bucket/runs/digits --output digits.html",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run directory, a path or a URI")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"where to write the page; {_NAME} in the run's directory if left out",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``report``.

    Raises:
        ConfigError: there is no run, or the page cannot be written.
    """
    from ray_trainer.report import read_run, render  # jinja2 is for this command alone

    storage = open_run(args.run_dir)
    page = render(read_run(storage, time.time()))
    print(_write(page, storage, args.output))
    return 0


def _write(page: str, storage: Storage, output: str | None) -> str:
    """Returns where the page is."""
    content = page.encode(errors="replace")
    try:
        if output is None:
            storage.write(_NAME, content)
            return f"{storage.path if storage.is_local else storage.uri}/{_NAME}"
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"The page cannot be written to {output or storage.uri!r}: {error}. Name a file with --output."
        ) from error
    return output
