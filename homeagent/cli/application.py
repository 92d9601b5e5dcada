"""Common parts of all commands, such as options, questions and error messages."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from logging.handlers import MemoryHandler
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from homeagent.cli.arguments import flag, option
from homeagent.cli.operator_texts import operator_text
from homeagent.cli.visible_text import escape_words
from homeagent.database import Database
from homeagent.engine.target import Target, resolve_target
from homeagent.errors import HomeAgentError, InvalidArgumentError
from homeagent.models.limits import Limits

# `_UsageError` is the class UsageError in Typer's copy of Click.
_UsageError: Any = typer.BadParameter.__base__

_DEFAULT_LIMITS = Limits()

_CREDENTIALS = re.compile(r"://(?!USER@)\S*@|((?:password|passwd)=)[^&\s]*", re.IGNORECASE)


@dataclass
class _Common:
    """Values of the common options --database and --json."""

    database: str | None = None
    as_json: bool = False


def _name_database(context: typer.Context, database: str | None) -> None:
    if database is not None:
        context.obj.database = database


class WithoutDatabase(TyperCommand):
    """A command without the option --database."""


class _Context(typer.Context):
    def make_formatter(self) -> Any:
        formatter: Any = super().make_formatter()
        formatter.width = min(shutil.get_terminal_size().columns, 100)
        formatter.write_dl = partial(formatter.write_dl, col_max=min(30, formatter.width // 3))
        return formatter


class _Commands(TyperGroup):
    context_class = _Context

    def __init__(self, *, commands: dict[str, Any], params: list[Any], **settings: Any) -> None:
        super().__init__(commands=commands, params=params, **settings)
        for command in commands.values():
            command.context_class = _Context
            # Set the short help, because Click would otherwise shorten the text.
            command.short_help = " ".join(command.help.partition("\n\n")[0].split())
        # Only the group of all commands declares these options.
        self._add_options([parameter for parameter in params if parameter.name in ("database", "as_json")])

    def _add_options(self, common: list[Any]) -> None:
        for command in self.commands.values():
            command.params += common[1:] if isinstance(command, WithoutDatabase) else common
            if isinstance(command, _Commands):
                command._add_options(common)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.parent is None:
            options = args[: args.index("--")] if "--" in args else args
            # Search for --json before parsing. Errors of the parser must be JSON too.
            ctx.obj = _Common(as_json="--json" in options)
        with _reported_errors(ctx.obj):
            if not args and not ctx.obj.as_json and not ctx.resilient_parsing:
                typer.echo(ctx.get_help(), err=True)
                raise typer.Exit(2)
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        with _reported_errors(ctx.obj), _printed_warnings(ctx.obj):
            return super().invoke(ctx)


@contextmanager
def _reported_errors(common: _Common) -> Iterator[None]:
    """Turn an expected error of the block into `typer.Exit`. Print a message, except after a broken pipe."""
    try:
        yield
    except _UsageError as error:
        # The message of a usage error shows the wrong argument. A wrong database URL can contain a password.
        text = _CREDENTIALS.sub(lambda found: f"{found[1]}***" if found[1] else "://***@", error.format_message())
        text = text.replace("Value error, ", "")  # Pydantic's prefix
        text += "" if text.endswith((".", "?")) else "."
        help = "" if error.ctx is None else f" Try '{error.ctx.command_path} --help'."
        _print_message(common, operator_text(text) + help, error="UsageError")
        raise typer.Exit(error.exit_code) from None
    except HomeAgentError as error:
        shown = {key: value for key, value in vars(error).items() if isinstance(value, (str, int, float, timedelta))}
        _print_message(common, operator_text(str(error)), error=type(error).__name__, details=shown)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        text = "the command was interrupted, and may have done its work already"
        _print_message(common, text, error="Interrupted")
        raise typer.Exit(130) from None  # as in a shell, the status is 128 plus the signal's number
    except OSError as error:
        # An OSError without a file name comes from a write to the standard output.
        if error.filename is not None:
            raise
        _discard_output()
        if not isinstance(error, BrokenPipeError):
            text = f"the output could not be written ({error.strerror}): the command may have done its work already"
            _print_message(common, text, error="OutputError")
        raise typer.Exit(1) from None


def _print_message(common: _Common, text: str, **facts: object) -> None:
    """Print a text on standard error. With --json, print a JSON object with the text and the facts."""
    line = escape_words(" ".join(text.split()))
    if common.as_json:
        typer.echo(json.dumps({**facts, "message": line}, default=timedelta.total_seconds), err=True)
    else:
        typer.echo(f"homeagent: {line}" if "error" in facts else f"homeagent: warning: {line}", err=True)


def _discard_output() -> None:
    """Redirect the standard output to /dev/null, because the flush at exit would fail."""
    with suppress(OSError, ValueError):  # `fileno()` raises ValueError if the output is not a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def _printed_warnings(common: _Common) -> Iterator[None]:
    # Print the warnings only after a success. A refused operation must print exactly one line.
    buffer = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)
    buffer.setLevel(logging.WARNING)
    logger = logging.getLogger("homeagent")
    logger.addHandler(buffer)
    try:
        yield
    finally:
        logger.removeHandler(buffer)
    for record in buffer.buffer:
        _print_message(common, record.getMessage(), warning=getattr(record, "event", "warning"))


def confirm(context: typer.Context, question: str, show: Callable[[], object], *, asks: bool = True) -> None:
    """Show the planned change, and ask a question. If the operator refuses, raise InvalidArgumentError.

    With --yes do not ask. With --dry-run only show the change.
    """
    if context.params.get("dry_run"):
        if not context.obj.as_json:
            show()
        return
    if context.params["yes"] or not asks:
        return
    if context.obj.as_json:
        raise typer.BadParameter("with --json the command can't ask: pass --yes.")
    if sys.stdin is None:
        raise InvalidArgumentError("the command can't ask, because it has no standard input: pass --yes")
    show()
    # Do not use `typer.confirm()`, which prints a space on standard output.
    typer.echo(f"{question} [y/N]: ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not (answer.endswith("\n") and sys.stdin.isatty()):  # on a terminal, the Enter key has begun a new line
        typer.echo(err=True)
    if not answer:
        raise InvalidArgumentError("the question got no answer, because the input has ended: answer y, or pass --yes")
    if answer.strip().lower() not in {"y", "yes"}:
        raise InvalidArgumentError("the answer was not y: nothing was changed")


app: typer.Typer = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["--help", "-h"]},
    # Do not print Typer's traceback, which shows local variables.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Typer's tables would shorten the names of options on a narrow terminal
)


def _show_version(asked: bool) -> None:
    if asked:
        from homeagent.version import __version__

        typer.echo(f"homeagent {__version__}")
        raise typer.Exit


@app.callback()
def _before_command(
    version: Annotated[
        bool, flag("--version", "Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    database: Annotated[
        str | None,
        option(
            "TARGET",
            "SQLite file or PostgreSQL URL. Default: $HOMEAGENT_DATABASE, else ~/.homeagent/homeagent.db.",
            expose_value=False,
            callback=_name_database,
        ),
    ] = None,
    as_json: Annotated[bool, flag("--json", "Print JSON, also for an error.", expose_value=False)] = False,
) -> None:
    """Operate the database of a home agent gateway.

    Exit status: 0 for success, 1 for a refused operation, 2 for wrong usage. The reason for a refusal is on standard
    error.
    """


def group(name: str, *, help: str) -> typer.Typer:
    """Add a group of commands, such as `homeagent devices`."""
    commands = typer.Typer(cls=_Commands, help=help, rich_markup_mode=None)
    app.add_typer(commands, name=name)
    return commands


def lasting_target(target: str | None) -> Target:
    """Return a parsed target. Raise InvalidArgumentError for `:memory:`."""
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database ends with this command: name a file or a server's URL")
    return where


def open_named(context: typer.Context, limits: Limits = _DEFAULT_LIMITS) -> Database:
    """Open the database of the command without creating or upgrading it."""
    # A command with a misspelt path must not create a file.
    return Database.open(context.obj.database, migrate=False, limits=limits)
