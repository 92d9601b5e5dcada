"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from homeagent.models.types import MAX_LIMIT

argument: partial[Any] = partial(typer.Argument, show_default=False)
"""An argument whose default value is not shown in the help."""

option: partial[Any] = partial(typer.Option, show_default=False)
"""An option whose default value is not shown in the help."""


def choice(values: type[StrEnum], **settings: Any) -> Any:
    """Declare an option whose value is a member of an enum."""
    return option(metavar="|".join(values), **settings)


def _check_timestamp(text: str | None) -> str | None:
    if text is not None:
        try:
            aware = datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise typer.BadParameter("must be a timestamp with an offset, such as 2030-01-31T12:00:00.000Z.")
    return text


timestamp_option: partial[Any] = partial(option, callback=_check_timestamp, metavar="TIMESTAMP")
"""An option whose value is a timestamp with an offset."""


def parsed_timestamp(text: str | None) -> datetime | None:
    """Return the value of a `timestamp_option`, or None if the option is absent."""
    return None if text is None else datetime.fromisoformat(text)


def _find_packages(migrations: str | None) -> str | None:
    # Also search the current directory for the application's package, as Alembic does.
    if migrations is not None and "" not in sys.path:
        sys.path.insert(0, "")
    return migrations


class Format(StrEnum):
    """Output format of a list, for people or for programs."""

    TABLE = "table"
    TSV = "tsv"


DeviceArgument = Annotated[str, argument(metavar="DEVICE", help="Id of the device.")]
AgentArgument = Annotated[str, argument(metavar="AGENT", help="Id of the agent.")]
SessionArgument = Annotated[str, argument(metavar="SESSION", help="Id of the session.")]
MethodArgument = Annotated[str, argument(metavar="METHOD", help="Name of the method.")]
KeyArgument = Annotated[str, argument(metavar="KEY", help="Key that the device chose.")]

LimitOption = Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of rows.")]
AfterOption = Annotated[str | None, option(metavar="ID", help="Last id of the previous page.")]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        metavar="|".join(Format),
        help="Form of the list. The form tsv prints tab-separated values below the column names. Times are in UTC.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what the command would do. Change nothing.")]
PairedAtOption = Annotated[
    str | None, timestamp_option(help="Refuse the change if the device was paired at another time.")
]
CreatedAtOption = Annotated[
    str | None, timestamp_option(help="Refuse the deletion if the row was created at another time.")
]
ConfigOption = Annotated[str | None, option(metavar="JSON", help="Configuration of the agent.")]

MigrationsOption = Annotated[
    str | None,
    option(
        metavar="PACKAGE:FOLDER",
        help="The application's own Alembic revisions: a folder of a package, or a path.",
        callback=_find_packages,
    ),
]
AcknowledgeOption = Annotated[
    list[str] | None,
    option(
        metavar="TRIGGER",
        help="Name of an application's trigger to accept on homeagent's tables. Can be repeated.",
    ),
]
