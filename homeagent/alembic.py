"""Run Alembic's commands on an application's tables. Call the functions of this module in the application's file
`env.py`.

A complete `env.py` has these lines:

```python
from alembic import context
from homeagent.alembic import run_environment
run_environment(context, package="hub")
```
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from configparser import InterpolationError
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alembic.util import CommandError
from sqlalchemy import MetaData

from homeagent.engine.engine import Engine
from homeagent.engine.sqlite.engine import SQLiteEngine, sidecar_lock
from homeagent.engine.target import ENVIRONMENT_VARIABLE
from homeagent.environment import BUSY_TIMEOUT
from homeagent.migrations.application import Application, revision_guard
from homeagent.migrations.autogenerate import application_tables, options, render_item, scratch_database
from homeagent.migrations.revisions import broken_references
from homeagent.models import APPLICATION_VERSION_TABLE, SCHEMA, VERSION_TABLE
from homeagent.models.types import check_names
from homeagent.opening import open_engine

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.postgresql.engine import PostgreSQLEngine

__all__ = ["TABLES", "include_name", "include_object", "render_item", "run_environment"]

TABLES: frozenset[str] = frozenset({table.name for table in SCHEMA} | {VERSION_TABLE})
"""Names of homeagent's tables, including the version table."""


def include_name(name: str | None, type_: str, parent_names: Mapping[str, str | None]) -> bool:
    """Return False for homeagent's tables and their columns, indexes and constraints. Pass `include_name` and
    `render_item` to Alembic's `context.configure`. Without `render_item`, a generated revision can fail.

    Args:
        name: name of the object in the database.
        type_: kind of the object, such as `table` or `index`.
        parent_names: names of the schema and the table that contain the object.
    """
    table = name if type_ == "table" else parent_names.get("table_name")
    return table not in TABLES or parent_names.get("schema_name") is not None


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """Return False for homeagent's tables and their columns, indexes and constraints. Pass `include_object` and
    `render_item` to Alembic's `context.configure`. Without `render_item`, a generated revision can fail.

    The metadata of `homeagent.Table` also contains homeagent's tables. An application's foreign key can name a table of
    homeagent.

    Args:
        object: SQLAlchemy object, such as a `Table` or a `Column`.
        name: name of the object.
        type_: kind of the object, such as `table` or `index`.
        reflected: True if Alembic read the object from the database.
        compare_to: second SQLAlchemy object if Alembic compares two objects, or None.
    """
    table = object if type_ == "table" else getattr(object, "table", None)
    return table is None or table.name not in TABLES or table.schema is not None


def run_environment(
    context: Any, package: str, *, metadata: Sequence[MetaData] = (), acknowledged: Collection[str] = ()
) -> None:
    """Run the current command of Alembic on the application's tables.

    The option `-x database=TARGET` names the database. Without the option, Alembic's configuration can name the
    database (`database = TARGET`). If the configuration names no database, homeagent uses `$HOMEAGENT_DATABASE`, then
    the configuration's `sqlalchemy.url`. Before the command, `run_environment()` upgrades homeagent's tables in a named
    database. Without a named database, `alembic revision` and `alembic check` use a scratch database. A program can
    pass a connection in `config.attributes["connection"]`.

    `run_environment()` imports all modules of the application's package. Autogenerate compares the tables of all
    modules with the database. Pass further tables in the argument `metadata=`.

    Args:
        context: the module `alembic.context`.
        package: name of the application's package.
        metadata: further `MetaData` objects with tables of the application, such as `SQLModel.metadata`.
        acknowledged: names of the application's triggers on homeagent's tables (see `Database.open`).

    Raises:
        alembic.util.CommandError: if no database is named, or if homeagent refuses the connection or a revision.
        HomeAgentError: if the function can't open or upgrade the database.
    """
    tables = application_tables(package, more=metadata, scripts=Path(context.script.dir).resolve())
    triggers = check_names(acknowledged, "acknowledged", "audit_devices")

    def configure(engine: str, **how: Any) -> None:
        context.configure(**how, **options(engine, tables, version_table=APPLICATION_VERSION_TABLE, more=metadata))

    given: Connection | None = context.config.attributes.get("connection")
    target = _target(context)
    if context.is_offline_mode():
        name = "postgresql" if str(target).startswith("postgres") else "sqlite"
        configure(name, dialect_name=name, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    with _connection(context, given, target, metadata, triggers) as connection:
        configure(connection.dialect.name, connection=connection)
        if given is None and target is None and context.get_context().opts["fn"].__name__ != "retrieve_migrations":
            raise CommandError(f"name the database: -x database=TARGET, or ${ENVIRONMENT_VARIABLE}")
        _run(context, connection, triggers)


def _target(context: Any) -> str | None:
    named = context.get_x_argument(as_dictionary=True).get("database")
    # Do not call `get_main_option()`, which does not read pyproject.toml.
    return (
        named
        or context.config.get_alembic_option("database")
        or os.environ.get(ENVIRONMENT_VARIABLE)
        or _sqlalchemy_url(context.config)
    )


def _sqlalchemy_url(config: Any) -> str | None:
    """Return Alembic's own option for the database, or None for an empty value or the value in Alembic's template."""
    try:
        url: str | None = config.get_alembic_option("sqlalchemy.url")
    except InterpolationError as error:
        raise CommandError("sqlalchemy.url is invalid: write %% for each character % of the URL") from error
    return None if url in ("", "driver://user:pass@localhost/dbname") else url


@contextmanager
def _connection(
    context: Any,
    given: Connection | None,
    target: str | None,
    metadata: Sequence[MetaData],
    acknowledged: frozenset[str],
) -> Iterator[Connection]:
    """Yield a connection to a database with homeagent's tables. On SQLite, foreign keys are off."""
    if given is not None:
        with _without_foreign_keys(given):
            yield given
    elif target is None:
        folder = Path(context.script.dir)
        application = Application.of(folder, acknowledged) if (folder / "versions").is_dir() else Application()
        with scratch_database(application) as connection:
            yield connection
    else:
        with (
            closing(open_engine(target, metadata=metadata, acknowledged=acknowledged)) as engine,
            _upgrade_lock(engine),
            engine.connect() as connection,
            _without_foreign_keys(connection),
        ):
            yield connection


def _upgrade_lock(engine: Engine) -> AbstractContextManager[object]:
    if isinstance(engine, SQLiteEngine):
        return sidecar_lock(engine.path, timeout=BUSY_TIMEOUT)
    from homeagent.migrations.postgresql import upgrade_lock

    return upgrade_lock(cast("PostgreSQLEngine", engine), BUSY_TIMEOUT)


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Switch foreign keys off. With foreign keys, the rebuild of a table can delete referring rows."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.name != "sqlite" or not raw.execute("PRAGMA foreign_keys").fetchall()[0][0]:
        yield
        return
    if raw.in_transaction:
        raise CommandError(
            "the connection is in a transaction with foreign keys, so a batch operation could delete rows of other "
            "tables: pass a connection without a transaction, or name the database and pass no connection"
        )
    raw.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        raw.execute("PRAGMA foreign_keys=ON")


def _run(context: Any, connection: Connection, acknowledged: frozenset[str]) -> None:
    with context.begin_transaction():
        before = broken_references(connection)
        with revision_guard(connection, acknowledged) as guard:
            if guard.has_ended:
                raise CommandError("the connection is in autocommit mode: pass a connection with transactions")
            migration = context.get_context()
            block = migration.autocommit_block
            migration.autocommit_block = lambda: guard.may_end(block())
            try:
                guard.begin("")
                context.run_migrations()
                guard.check()
            except Exception as error:
                if guard.refused is None:
                    raise
                outcome = "failed" if guard.has_ended else "was undone"
                raise CommandError(f"the revision {outcome}: {guard.refused}") from error
        # The application's tables may have as many broken references as before.
        worse = broken_references(connection) - before
        if worse:
            raise CommandError(f"the revision left {worse.total()} broken references from {min(worse)[0]}")
