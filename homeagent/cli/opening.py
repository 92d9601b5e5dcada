"""Choose the database of a command, and open the database."""

from __future__ import annotations

import typer

from homeagent.database import Database

__all__ = ["open_named", "target_of"]


def target_of(context: typer.Context, database: str | None) -> str | None:
    """Return the --database option of the command or, if absent, the option before the command."""
    named_before: str | None = context.obj
    return named_before if database is None else database


def open_named(context: typer.Context, database: str | None) -> Database:
    """Open the database of the command without creating or upgrading it."""
    # Only `init` and `migrate` create or upgrade a database, because a misspelt path must not create a file.
    return Database.open(target_of(context, database), migrate=False)
