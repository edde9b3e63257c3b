"""``ray-trainer completion``: a script with which a shell completes commands and options."""

import argparse
from collections.abc import Callable

from ray_trainer.cli.commands import Subparsers, add_command

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]", whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Add ``completion``.

    Args:
        subparsers: where to.
        whole: gives the parser of the whole program.
    """
    parser = add_command(
        subparsers,
        "completion",
        help="print a script that completes commands and options in your shell",
        examples="""
            eval "$(ray-trainer completion bash)"
            ray-trainer completion zsh > "${fpath[1]}/_ray-trainer"
        """,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=lambda args: run(args, whole()))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Carry out ``completion``."""
    import shtab  # late: no other command needs it

    print(shtab.complete(parser, shell=args.shell))
    return 0
