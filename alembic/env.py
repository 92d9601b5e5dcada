"""Run the revisions on the connection that homeagent passes, or on a developer's database at the command line.

At the command line, `-x database=TARGET` names the database. Without this option, the variable `$HOMEAGENT_DATABASE`
names the database. If neither is given, the commands `revision` and `check` compare the models with an upgraded scratch
database. Do not configure logging here, because the host application configures it.
"""

import tempfile
from pathlib import Path
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection

from alembic import context
from homeagent.engine.files.database_file import create_file
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.target import ENVIRONMENT_VARIABLE, resolve_target
from homeagent.migrations import VERSION_TABLE
from homeagent.migrations.autogenerate import options as table_options
from homeagent.models import TABLES


def options(connection: Connection) -> dict[str, Any]:
    """Return Alembic's options for this connection. They ignore the tables of an application in the same schema."""
    return table_options(connection.dialect.name, TABLES, version_table=VERSION_TABLE)


def upgrade_scratch(connection: Connection) -> None:
    """Bring a scratch database to the newest revision, in a separate migration context.

    The migration context of the running command stays unchanged.
    """
    script = context.script
    scratch = MigrationContext.configure(
        connection, opts={**options(connection), "fn": lambda revision, _: script._upgrade_revs("head", revision)}
    )
    with connection.begin(), Operations.context(scratch):
        scratch.run_migrations()


def run(connection: Connection) -> None:
    """Run the command's migrations on this connection."""
    context.configure(connection=connection, **options(connection))
    with context.begin_transaction():
        context.run_migrations()


def run_at_command_line() -> None:
    """Run a developer's Alembic command."""
    given = context.get_x_argument(as_dictionary=True).get("database")
    command = getattr(context.config.cmd_opts, "cmd", [None])[0]
    import os
    from datetime import timedelta

    given = given or os.environ.get(ENVIRONMENT_VARIABLE)
    wait = timedelta(seconds=30)
    if given:
        target = resolve_target(given)
        if target.url is not None:
            server = PostgreSQLEngine(target.url, busy_timeout=wait)
            with server.connect() as connection:
                run(connection)
            return
        if target.path is not None:
            with SQLiteEngine(target.path, busy_timeout=wait, durability="full").connect() as connection:
                # While foreign keys are on, rebuilding a table fails, or deletes the rows that refer to the table.
                connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")
                run(connection)
            return
    if getattr(command, "__name__", "") not in {"revision", "check"}:
        raise CommandError(
            f"name the database: -x database=TARGET or ${ENVIRONMENT_VARIABLE}; or use 'homeagent migrate'"
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "scratch.db"
        create_file(path)
        engine = SQLiteEngine(path, busy_timeout=wait, durability="normal")
        with engine.connect() as connection:
            upgrade_scratch(connection)
            run(connection)
        engine.close()


handed_over = context.config.attributes.get("connection")
if handed_over is None:
    run_at_command_line()
else:
    run(handed_over)
