"""Command that copies a store from SQLite to PostgreSQL or back (`homeagent copy`)."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import WithoutDatabase, app
from homeagent.cli.arguments import AcknowledgeOption, MigrationsOption, argument, option
from homeagent.cli.migrations import import_tables
from homeagent.cli.output import count, print_result, shown_progress
from homeagent.database import Database
from homeagent.engine.target import Target, resolve_target
from homeagent.errors import InvalidArgumentError, SchemaOutdatedError


@app.command(cls=WithoutDatabase)
def copy(
    context: typer.Context,
    source: Annotated[str, argument(metavar="SOURCE", help="SQLite file or PostgreSQL URL.")],
    target: Annotated[
        str, argument(metavar="TARGET", help="Empty PostgreSQL database, or SQLite file that is empty or absent.")
    ],
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="For a trial: allow programs to use SOURCE during the copy. Changes after the start are not copied.",
        ),
    ] = False,
    migrations: MigrationsOption = None,
    leave: Annotated[
        list[str] | None,
        option(metavar="TABLE", help="Table of an application that the command does not copy. Can be repeated."),
    ] = None,
    acknowledge: AcknowledgeOption = None,
) -> None:
    """Copy a whole store into an empty database. SOURCE and TARGET can have different engines.

    First stop every gateway and sweeper that uses SOURCE. The command copies all rows in one transaction and compares
    them row by row. If a step fails, TARGET stays empty. SOURCE is not changed.

    Tables of an application are copied too. If TARGET does not have the application's tables yet, name the
    application's revisions by --migrations.
    """
    if context.obj.database is not None:
        raise typer.BadParameter("copy takes SOURCE and TARGET: leave out --database.")
    origin, destination = _named(source), _named(target)
    import_tables(migrations)
    with (
        Database.open(source, migrate=False, acknowledged=acknowledge or ()) as opened,
        _open_target(target, migrations) as empty,
        shown_progress(context) as progress,
    ):
        report = opened.copy_to(empty, live=live, leave=leave or (), progress=progress)
    places = {"source": origin.location, "target": destination.location}
    same = "as it was at the beginning" if live else "the same on both sides"
    rows = count(sum(report.rows.values()), "row")
    text = f"Copied {origin.location} to {destination.location}: {rows}, {same}."
    print_result(context, {**places, "live": live, **report.model_dump(mode="json")}, text)


def _named(target: str) -> Target:
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database ends with this command: name a file or a server's URL")
    return where


def _open_target(target: str, migrations: str | None) -> Database:
    try:
        return Database.open(target, migrate=False, migrations=migrations)
    except SchemaOutdatedError as outdated:
        # Do not upgrade an existing target, because the copy can still refuse a target that has rows.
        if outdated.revision is not None:
            raise
    return Database.open(target, migrations=migrations)
