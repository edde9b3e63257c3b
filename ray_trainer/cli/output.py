"""What commands print: colours and bold type on a terminal, plain aligned text in a pipe, JSON for scripts."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ray_trainer.metrics.jsonl import encode_row

_GAP = "  "


def keep_pipes_plain() -> None:
    """Let Ray put plain prefixes before what its processes print, unless it is a terminal that shows it."""
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


def print_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Strict JSON: a number that is none becomes null."""
    plain = _plain(value) if isinstance(value, Mapping) else [_plain(item) for item in value]
    print(json.dumps(plain, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Columns as wide as what is in them; nothing is cut off.

    Args:
        header: names of the columns.
        rows: cells; one that reads as a number is set to the right.
        styles: how a cell with just this text looks on a terminal.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    for number, line in enumerate(lines):
        text = Text()
        for place, cell in enumerate(line):
            column = [other[place] for other in lines[1:]]
            is_number = bool(column) and all(one[:1].isdigit() or one == "-" for one in column)
            style = "bold" if number == 0 else (styles or {}).get(cell, "")
            text.append(cell.rjust(widths[place]) if is_number else cell.ljust(widths[place]), style)
            text.append(_GAP)
        text.rstrip()
        print_line(text)


def print_line(line: Text | str) -> None:
    """One line, however long."""
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(line)


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(encode_row(item))
    plain.pop("non_finite", None)
    return plain
