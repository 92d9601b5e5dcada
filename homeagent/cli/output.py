"""Output of the commands for people and for programs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from textwrap import wrap
from typing import TYPE_CHECKING

import typer

from homeagent.cli.arguments import Format
from homeagent.cli.visible_text import escape_words, identity

if TYPE_CHECKING:
    from homeagent.maintenance.copy_store import CopyProgress

_LEAST = 24  # minimum width of a wrapped value, in characters


def print_result(context: typer.Context, value: object, text: str | Callable[[], object]) -> None:
    """With --json print the value as JSON. Without --json print the given text, or call the given function."""
    if context.obj.as_json:
        # Do not pass `ensure_ascii=False`, because some characters could control the terminal.
        typer.echo(json.dumps(value, indent=2))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        text()


def print_list(
    context: typer.Context, headings: Sequence[str], rows: Iterable[Sequence[object]], values: object
) -> None:
    """Print a list as JSON, as a table or as TSV. If the list reaches --limit, print a note."""
    rows = list(rows)
    print_rows = _print_tsv if context.params["form"] is Format.TSV else print_table
    print_result(context, values, lambda: print_rows(headings, rows))
    if len(rows) == context.params.get("limit") and not context.obj.as_json:
        limit = count(len(rows), "row")
        typer.echo(f"The list ends at its limit of {limit}: raise --limit to see more rows.", err=True)


def _print_tsv(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    for row in ([heading.lower().replace(" ", "_") for heading in headings], *rows):
        typer.echo("\t".join(map(_value, row)))


def rows_in(tables: Sequence[str]) -> str:
    """Return a part of a sentence about rows that a cascade deletes. Without tables, return an empty text."""
    return f", and their rows in {', '.join(map(escape_words, tables))}" if tables else ""


def print_deletion(
    context: typer.Context,
    deleted: int,
    what: str,
    cascades: Sequence[str],
    *,
    ids: list[str] | None = None,
    **others: int,
) -> None:
    """Print what a command deleted. The argument `cascades=` names the tables of the application that lose rows. With
    --dry-run also print the numbers of dependent rows, such as sessions, and the `ids` of the devices as JSON.
    """
    tables = {"cascades": cascades} if cascades else {}
    if context.params.get("dry_run"):
        more = "".join(f" and {count(rows, name.removesuffix('s').replace('_', ' '))}" for name, rows in others.items())
        text = f"Would delete {what}{more}{rows_in(cascades)}. Nothing was changed."
        devices = {} if ids is None else {"devices": ids}
        print_result(context, {"dry_run": True, "deleted": deleted, **devices, **others, **tables}, text)
    else:
        print_result(context, {"deleted": deleted, **tables}, f"Deleted {what}{rows_in(cascades)}.")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, error: bool = False) -> None:
    """Print a table. With `error=True`, print the table on standard error."""
    rows = list(rows)
    cells = [list(map(_cell, row)) for row in rows]
    widths = [max(map(_width, column)) for column in zip(headings, *cells, strict=True)]
    available = _terminal_width(error=error)
    if available is not None and sum(widths) + 2 * (len(widths) - 1) > available:
        for number, line in enumerate(cells):
            if number:
                typer.echo(err=error)
            print_facts(zip(headings, line, strict=True), error=error)
        return
    numeric = [any(isinstance(row[column], int) for row in rows) for column in range(len(headings))]
    typer.echo(typer.style(_aligned(headings, widths, numeric), bold=True), err=error)
    for line in cells:
        typer.echo(_aligned(line, widths, numeric), err=error)


def _aligned(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = []
    for cell, width, right in zip(cells, widths, numeric, strict=True):
        space = " " * (width - _width(cell))
        padded.append(space + cell if right else cell + space)
    return "  ".join(padded).rstrip(" ")


def print_facts(
    facts: Iterable[tuple[str, str]], *, colours: Mapping[str, str] | None = None, error: bool = False
) -> None:
    """Print the name and the value of each fact. A name without a colour is bold."""
    facts = list(facts)
    longest = max((_width(name) for name, _ in facts), default=0)
    available = _terminal_width(error=error)
    for name, value in facts:
        colour = (colours or {}).get(name)
        label = typer.style(name, fg=colour, bold=True if colour is None else None)
        space, indent = " " * (longest + 2 - _width(name)), longest + 2
        lines = value.split("\n")
        if available is not None:
            if max([min(_LEAST, _width(value)), *map(_width, value.split())]) > available - indent:
                # Print the value below the name, because the line is too narrow.
                space, indent = "\n  ", 2
            lines = [part for line in lines for part in _wrapped(line, available - indent)]
        typer.echo(label + space + ("\n" + " " * indent).join(lines), err=error)


def _wrapped(line: str, width: int) -> list[str]:
    # Do not wrap an indented line, which is a command to copy.
    return [line] if line[:1] in ("", " ") else wrap(line, width, break_long_words=False)


def _width(text: str) -> int:
    """Return the width of a text in terminal columns. An emoji fills two columns."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _terminal_width(*, error: bool) -> int | None:
    """Return the terminal's width in columns, or None without a terminal."""
    stream = sys.stderr if error else sys.stdout
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return format_timestamp(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else identity(str(value))


def _value(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    text = "" if value is None else str(value).replace("\\", r"\\")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def format_timestamp(value: datetime | None) -> str:
    """Return a timestamp as text in local time, with the offset from UTC. For None, return the text "never"."""
    return "never" if value is None else value.astimezone().isoformat(sep=" ", timespec="milliseconds")


def count(number: int, noun: str) -> str:
    """Return a number and a noun, such as "2 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def shown_progress(
    context: typer.Context, activity: str | None = None
) -> Iterator[Callable[[CopyProgress], object] | None]:
    """Show progress bars during the block. Yield a function that updates the bars, or None without bars."""
    if context.obj.as_json or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Import Rich lazily, because most commands draw no progress bar.
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TaskID

    bars: dict[str, TaskID] = {}
    columns = [*Progress.get_default_columns(), *([MofNCompleteColumn()] if activity is None else [])]
    with Progress(*columns, console=Console(stderr=True), transient=activity is not None) as shown:
        if activity is not None:
            shown.add_task(activity, total=None)

        def report(done: CopyProgress) -> None:
            if done.step not in bars:
                bars[done.step] = shown.add_task(done.step, total=done.total)
            shown.update(bars[done.step], completed=done.rows)

        yield report
