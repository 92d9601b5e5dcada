"""Arguments and options that several commands share, and short forms of Typer's declarations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import MAX_LIMIT, check_timestamp


def argument(metavar: str, help: str) -> Any:
    """Declare an argument whose default value is not shown in the help."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def option(metavar: str, help: str, *names: str, show_default: bool | str = False, **settings: Any) -> Any:
    """Declare an option with a value. Without `show_default` the help does not show the default value."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=show_default, **settings)


def flag(name: str, help: str, **settings: Any) -> Any:
    """Declare an option without a value. The explicit name prevents an opposite option such as --no-yes."""
    return typer.Option(name, help=help, **settings)


def choice(values: type[StrEnum], help: str, *names: str, **settings: Any) -> Any:
    """Declare an option whose value is a member of an enum."""
    return option("|".join(values), help, *names, **settings)


def seconds(help: str, *, min: int, show_default: bool | str = True) -> Any:
    """Declare an option whose value is a duration in seconds, of at most 366 days."""
    return option("SECONDS", help, min=min, max=366 * 24 * 3600, show_default=show_default)


def text(metavar: str, help: str, check: Callable[[str], str]) -> Any:
    """Declare an option whose value must pass `check()`. Otherwise the command ends with the status for wrong usage."""

    def read(value: str) -> str:
        try:
            return check(value)
        except InvalidArgumentError as error:
            raise typer.BadParameter(f"{error}.") from None

    return option(metavar, help, parser=read)


def timestamp(help: str) -> Any:
    """Declare an option whose value is a timestamp with an offset."""
    return option("TIMESTAMP", help, parser=_read_timestamp)


def _read_timestamp(text: str) -> datetime:
    found: datetime | None = None
    with suppress(ValueError):
        found = datetime.fromisoformat(text)
    if found is None or found.tzinfo is None:
        raise typer.BadParameter("must be a timestamp with an offset, such as 2030-01-31T12:00:00.000Z.")
    try:
        return check_timestamp(found)
    except InvalidArgumentError as error:
        raise typer.BadParameter(f"{error}.") from None


def _find_packages(migrations: str | None) -> str | None:
    # Also search the current directory for the application's package, as Alembic does.
    if migrations is not None and "" not in sys.path:
        sys.path.insert(0, "")
    return migrations


class Format(StrEnum):
    """Output format of a list, for people or for programs."""

    TABLE = "table"
    TSV = "tsv"


DeviceArgument = Annotated[str, argument("DEVICE", "Id of the device.")]
AgentArgument = Annotated[str, argument("AGENT", "Id of the agent.")]
SessionArgument = Annotated[str, argument("SESSION", "Id of the session.")]

LimitOption = Annotated[int, option("ROWS", "Maximum number of rows.", min=1, max=MAX_LIMIT, show_default=True)]
AfterOption = Annotated[str | None, option("ID", "Last id of the previous page.")]
_FORMS = "Form of the list. The form tsv prints column names, tab-separated values, and times in UTC."
FormatOption = Annotated[Format, choice(Format, _FORMS, "--format", show_default=True)]
YesOption = Annotated[bool, flag("--yes", "Do not ask.")]
DryRunOption = Annotated[bool, flag("--dry-run", "Show what the command would do. Change nothing.")]
PairedAtOption = Annotated[datetime | None, timestamp("Refuse the change if the device was paired at another time.")]
CreatedAtOption = Annotated[datetime | None, timestamp("Refuse the deletion if the row was created at another time.")]
ConfigOption = Annotated[str | None, option("JSON", "Configuration of the agent.")]

_REVISIONS = "The application's own Alembic revisions: a folder of a package, or a path."
MigrationsOption = Annotated[str | None, option("PACKAGE:FOLDER", _REVISIONS, callback=_find_packages)]
_TRIGGERS = "Name of an application's trigger on homeagent's tables. Can be repeated."
AcknowledgeOption = Annotated[list[str] | None, option("TRIGGER", _TRIGGERS)]
