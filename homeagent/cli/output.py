"""How the commands print: for people on a terminal, and as JSON for programs."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated
from unicodedata import is_normalized

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["JsonOption", "console_for", "count", "facts_table", "grid", "identity", "instant", "print_json"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(value: object) -> None:
    """Print a value as JSON."""
    # ASCII: it is right in any encoding, and no character of an id or a reason steers the terminal.
    typer.echo(json.dumps(value, indent=2))


def console_for(*, error: bool = False) -> Console:
    """Return a console on standard output, or on standard error."""
    # What is stored is never taken for markup.
    return Console(stderr=error, markup=False, highlight=False, emoji=False)


def grid(*, header: bool = False) -> Table:
    """Return an empty table without lines."""
    return Table(box=None, show_header=header, pad_edge=False, header_style="bold")


def facts_table(facts: dict[str, str]) -> Table:
    """Return a table of names and what they stand for."""
    table = grid()
    table.add_column(style="bold", no_wrap=True)
    # An id is shown whole, whatever the width: it is what the reader decides on.
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def identity(text: str) -> str:
    """Return an id as it is shown: in quotes and with escapes where it would otherwise read as another one."""
    # What has no width, a space at an end or of another kind, and an accent that is a character of its own are not to
    # be seen.
    plain = text.isprintable() and text == text.strip() and is_normalized("NFC", text)
    return text if plain else repr(text)


def instant(value: datetime | None) -> str:
    """Return an instant as it is shown."""
    return "never" if value is None else value.isoformat(sep=" ", timespec="milliseconds")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
