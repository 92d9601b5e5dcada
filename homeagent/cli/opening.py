"""Choose the database of a command, and open the database."""

from __future__ import annotations

import typer

from homeagent.database import Database


def target_of(context: typer.Context) -> str | None:
    """Return the value of the option --database, which can stand before or after the command, or None."""
    target: str | None = context.obj.database
    return target


def open_named(context: typer.Context) -> Database:
    """Open the database of the command without creating or upgrading it."""
    # Only `init` and `migrate` create or upgrade a database, because a misspelt path must not create a file.
    return Database.open(target_of(context), migrate=False)
