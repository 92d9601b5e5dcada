"""Compare the models with the revisions, for the commands `alembic check` and `alembic revision --autogenerate`.

The revisions run in a scratch database of SQLite. If `$HOMEAGENT_DATABASE` is the URL of a PostgreSQL database, the
commands compare the models with this database. The command `homeagent migrate` upgrades a database.
"""

from contextlib import closing

from alembic.util import CommandError
from sqlalchemy import Connection

from alembic import context
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.inspection import scratch_sqlite
from homeagent.engine.target import resolve_target
from homeagent.environment import BUSY_TIMEOUT
from homeagent.migrations import VERSION_TABLE
from homeagent.migrations.autogenerate import options
from homeagent.migrations.revisions import run_revisions
from homeagent.models import TABLES


def run(connection: Connection) -> None:
    """Run the command on a database with all revisions. Ignore the tables of an application."""
    context.configure(connection, **options(connection.dialect.name, TABLES, version_table=VERSION_TABLE))
    if context.get_context().opts["fn"].__name__ != "retrieve_migrations":
        raise CommandError("the environment serves the commands 'check' and 'revision': use 'homeagent migrate'")
    with context.begin_transaction():
        context.run_migrations()


url = resolve_target(None).url
if url is not None:
    with closing(PostgreSQLEngine(url, busy_timeout=BUSY_TIMEOUT)) as engine, engine.connect() as server:
        run(server)
else:
    with scratch_sqlite() as scratch:
        with scratch.begin():
            scripts = [script.module for script in context.script.walk_revisions()]
            run_revisions(scratch, scripts, VERSION_TABLE, "head")
        run(scratch)
