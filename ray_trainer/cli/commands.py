"""How every command is described: a line in the list of commands, and a help page that ends with examples."""

import argparse

Subparsers = argparse._SubParsersAction  # the type that argparse itself has no public name for


def add_command(
    subparsers: "Subparsers[argparse.ArgumentParser]",
    name: str,
    help: str,
    examples: str,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command whose ``--help`` ends with examples.

    Args:
        subparsers: where to.
        name: of the command.
        help: what it does, in a line.
        examples: command lines, one a line.
        usage: the arguments, where argparse would not tell all of them.
    """
    lines = examples.strip().splitlines()
    return subparsers.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        usage=None if usage is None else f"%(prog)s {usage}",
        epilog="\n  ".join([f"example{'s' * (len(lines) > 1)}:", *(line.strip() for line in lines)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
