"""Choose the database of a command, and open the database."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from homeagent.database import Database

__all__ = ["AcknowledgeOption", "MigrationsOption", "open_named", "target_of"]


def _find_packages(migrations: str | None) -> str | None:
    # Find the application's package in the current directory also, as Alembic does.
    if migrations is not None and "" not in sys.path:
        sys.path.insert(0, "")
    return migrations


MigrationsOption = Annotated[
    str | None,
    typer.Option(
        "--migrations",
        metavar="PACKAGE:FOLDER",
        help="The application's own Alembic revisions: a folder of a package, or a path.",
        show_default=False,
        callback=_find_packages,
    ),
]

AcknowledgeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--acknowledge",
        metavar="TRIGGER",
        help="Name of an application's trigger on homeagent's tables that is accepted. Can be repeated.",
        show_default=False,
    ),
]


def target_of(context: typer.Context, database: str | None) -> str | None:
    """Return the option `--database` of the command or, if it is absent, the same option before the command."""
    named_before: str | None = context.obj.database
    return named_before if database is None else database


def open_named(context: typer.Context, database: str | None) -> Database:
    """Open the database of the command without creating or upgrading it."""
    # Only `init` and `migrate` create or upgrade a database, because a misspelt path must not create a file.
    return Database.open(target_of(context, database), migrate=False)
