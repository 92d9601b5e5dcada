"""Common parts of all commands: exit status, output of errors and warnings, and the option --database."""

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

from homeagent.cli.visible_text import escape_words
from homeagent.errors import HomeAgentError

__all__ = ["DatabaseOption", "app", "group", "main"]

# This class is Click's UsageError. Newer versions of Typer contain a copy of Click, and older versions depend on Click.
_UsageError: Any = typer.BadParameter.__base__

_CREDENTIALS = re.compile(r"://\S*@|((?:password|passwd)=)[^&\s]*", re.IGNORECASE)


class _Commands(TyperGroup):
    """A group of commands. A refused operation prints one line and exits with status 1. Usage errors hide passwords."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _hide_credentials():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            with _hide_credentials(), _print_warnings_on_success():
                return super().invoke(ctx)
        except HomeAgentError as error:
            typer.echo(f"homeagent: {_one_line(str(error))}", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _hide_credentials() -> Iterator[None]:
    # A usage error repeats the argument, which can be a database URL in the wrong position.
    try:
        yield
    except _UsageError as error:
        error.message = _CREDENTIALS.sub(lambda found: f"{found[1]}***" if found[1] else "://***@", error.message)
        raise


class _WarningBuffer(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _print_warnings_on_success() -> Iterator[None]:
    # A refused operation must print exactly one line, so print the warnings only after a success.
    buffer = _WarningBuffer()
    logger = logging.getLogger("homeagent")
    logger.addHandler(buffer)
    try:
        yield
    finally:
        logger.removeHandler(buffer)
    for record in buffer.records:
        typer.echo(f"homeagent: warning: {_one_line(record.getMessage())}", err=True)


def _one_line(text: str) -> str:
    return escape_words(" ".join(text.split()))


def main() -> None:
    """Run the command in `sys.argv`, and exit with the status of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print characters outside the terminal's encoding as escapes instead of raising UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="homeagent")


DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="TARGET",
        help="SQLite file or PostgreSQL URL. Default: $HOMEAGENT_DATABASE, else ~/.homeagent/homeagent.db.",
        show_default=False,
    ),
]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # An error other than HomeAgentError is a bug. Print the plain traceback, because Typer's traceback would show local
    # variables.
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
    """Operate the database of a home agent gateway.

    Exit status: 0 for success, 1 for a refused operation with the reason on standard error, 2 for wrong usage.
    """
    context.obj = database


def group(name: str, *, help: str) -> typer.Typer:
    """Add a group of commands, such as `devices`.

    The option --database can also stand before the commands of the group.
    """
    commands = typer.Typer(cls=_Commands, no_args_is_help=True, help=help)
    app.add_typer(commands, name=name)

    @commands.callback()
    def before_command(context: typer.Context, database: DatabaseOption = None) -> None:
        if database is not None:
            context.obj = database

    return commands
