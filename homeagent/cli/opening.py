"""Which database a command speaks of, and how it opens it."""

from __future__ import annotations

import typer

from homeagent.database import Database

__all__ = ["open_named", "target_of"]


def target_of(context: typer.Context, database: str | None) -> str | None:
    """Return the target that stands nearest to the command; None where none was named."""
    named_before: str | None = context.obj
    return named_before if database is None else database


def open_named(context: typer.Context, database: str | None) -> Database:
    """Open the database that the command speaks of, as it is."""
    # Only `init` and `migrate` make or change a schema: a misspelt path leaves no new file behind.
    return Database.open(target_of(context, database), migrate=False)
