"""How results look: one console for people, one way to print JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 100  # where the output is not a terminal

# Results go to stdout; progress, notes and errors to stderr, so that a pipe gets results only.
out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)
out.width = max(out.width, 80)  # a narrower terminal wraps the lines of tables; Rich would cut digits off
err = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False)


def note(message: str) -> None:
    """One line beside the results."""
    err.print(message, style="dim", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """The whole answer of a command as one JSON document on stdout."""
    print(json.dumps(value, indent=1))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table. A column whose name begins with ">" is right-aligned numbers."""
    made = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    made.padding = (0, int(len(columns) < 10), 0, 0)  # so that 80 columns hold the widest tables whole
    for column in columns:
        number = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def us(value: float | None) -> str:
    """Microseconds to three or four digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def fraction(value: float | None) -> str:
    """A fraction of the roofline, coloured by how much is left."""
    if value is None:
        return "-"
    colour = "green" if value >= 0.8 else "yellow" if value >= 0.6 else "red"
    return f"[{colour}]{value:.2f}[/]"


def times(value: float | None) -> str:
    """A speedup."""
    return "-" if value is None else f"{value:.2f}x"
