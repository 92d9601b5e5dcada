"""Output of the commands, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["JsonOption", "console_for", "count", "facts_table", "format_timestamp", "grid", "print_json"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: object) -> None:
    """Print a value as JSON."""
    # Escape characters outside ASCII, so that the output is valid in any encoding, and an id can't control the
    # terminal.
    typer.echo(json.dumps(value, indent=2))


def console_for(*, error: bool = False) -> Console:
    """Return a console on standard output, or on standard error if `error` is true."""
    # Stored values can contain Rich markup, so print the values literally.
    return Console(stderr=error, markup=False, highlight=False, emoji=False)


def grid(*, header: bool = False) -> Table:
    """Return an empty table without lines."""
    return Table(box=None, show_header=header, pad_edge=False, header_style="bold")


def facts_table(facts: dict[str, str]) -> Table:
    """Return a table of names and values."""
    table = grid()
    table.add_column(style="bold", no_wrap=True)
    # Fold long values. The operator decides by the id, so print the whole id at any width.
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def format_timestamp(value: datetime | None) -> str:
    """Return a timestamp as text, or `never` for None."""
    return "never" if value is None else value.isoformat(sep=" ", timespec="milliseconds")


def count(number: int, noun: str) -> str:
    """Return a number and a noun, with a plural s if the number is not 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
