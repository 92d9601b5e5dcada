"""The frame of the command line: how a command ends, and what every group of commands begins with."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from homeagent.errors import HomeAgentError

__all__ = ["DatabaseOption", "app", "group", "main"]

# Typer carries Click inside it in its newer versions and depends on it in the older ones; this is either's UsageError.
_UsageError: Any = typer.BadParameter.__base__

_CREDENTIALS = re.compile(r"://\S*@|((?:password|passwd)=)[^&\s]*", re.IGNORECASE)


# How a command ends


class _Commands(TyperGroup):
    """Ends a refused operation with one line and status 1, and keeps credentials out of messages on wrong usage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _discreet():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            with _discreet(), _warnings_at_the_end():
                return super().invoke(ctx)
        except HomeAgentError as error:
            typer.echo(f"homeagent: {_one_line(str(error))}", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _discreet() -> Iterator[None]:
    # A message on wrong usage repeats the argument, which may be a database's URL in the wrong place.
    try:
        yield
    except _UsageError as error:
        error.message = _CREDENTIALS.sub(lambda found: f"{found[1]}***" if found[1] else "://***@", error.message)
        raise


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _warnings_at_the_end() -> Iterator[None]:
    # A refused operation leaves exactly one line, which a warning logged on the way would make two.
    kept = _Kept()
    logger = logging.getLogger("homeagent")
    logger.addHandler(kept)
    try:
        yield
    finally:
        logger.removeHandler(kept)
    for record in kept.records:
        typer.echo(f"homeagent: warning: {_one_line(record.getMessage())}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Run the command that `sys.argv` names, and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An id in a script that the terminal's encoding lacks is shown as its code points; it ends no command.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="homeagent")


DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="TARGET",
        help="A SQLite file or a PostgreSQL URL. Left out: $HOMEAGENT_DATABASE, else ~/.homeagent/homeagent.db.",
        show_default=False,
    ),
]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # Whatever is no refusal is a bug: the plain traceback, without the values of local variables.
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from homeagent.version import __version__

        typer.echo(f"homeagent {__version__}")
        raise typer.Exit


@app.callback()
def _before_command(
    context: typer.Context,
    database: DatabaseOption = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The operational store of a home agent gateway.

    Exit status: 0; 1 for a refused operation, with the reason on standard error; 2 for wrong usage.
    """
    context.obj = database


def group(name: str, *, help: str) -> typer.Typer:
    """Return a new group of commands, such as `devices`, that takes --database before its own commands too."""
    commands = typer.Typer(cls=_Commands, no_args_is_help=True, help=help)
    app.add_typer(commands, name=name)

    @commands.callback()
    def before_command(context: typer.Context, database: DatabaseOption = None) -> None:
        if database is not None:
            context.obj = database

    return commands
