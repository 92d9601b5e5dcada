"""Adopt an application's database: add homeagent's tables to the database.

A SQLite file can have tables of homeagent's first version, with NULL keys. One transaction converts the tables and
writes the application id. A crash can't leave a partly adopted file.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from sqlalchemy import text

from homeagent.clock import system_clock
from homeagent.engine.files.database_file import inspect_file, look_at, sidecars
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.filesystems import refuse_network_filesystem
from homeagent.engine.files.system_errors import quoted
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.engine import APPLICATION_ID, SQLiteEngine, sidecar_lock
from homeagent.engine.sqlite.in_use import kept_from_sqlite
from homeagent.engine.sqlite.inspection import inspect_sqlite
from homeagent.engine.target import Target
from homeagent.environment import BUSY_TIMEOUT
from homeagent.errors import DatabaseBusyError, ForeignDatabaseError
from homeagent.migrations.application import ALEMBIC_TABLE, Application
from homeagent.migrations.rehearsal import kept_objects, refuse_broken_objects, refuse_unconvertible_rows
from homeagent.migrations.revisions import (
    REVISION,
    broken_references,
    count_rows,
    own_tables,
    revision_of,
    tables,
    upgrade,
)
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.migrations.sqlite import back_up, upgrade_transaction
from homeagent.opening import open_engine

if TYPE_CHECKING:
    from sqlalchemy import Connection

_FIRST = "0001"
_FIRST_TABLES = {
    "agents": ("id", "name", "workspace_path", "created_at", "config"),
    "devices": ("id", "role", "shared_secret_hash", "approved", "paired_at", "last_seen_at", "metadata"),
    "idempotency_keys": ("key", "method", "device_id", "result", "created_at", "expires_at"),
    "nonces": ("nonce", "device_id", "created_at", "expires_at"),
    "sessions": ("session_id", "agent_id", "sender_id", "channel_id", "created_at", "last_active_at"),
}
"""Columns of the tables of revision 0001. The first column is the key."""


class AdoptionReport(BaseModel, frozen=True):
    """State of a database before its adoption, and the adoption's changes.

    Attributes:
        location: path of the file, or URL of the server without its password.
        tables: the application's own tables, with the number of rows in each table.
        converted: number of rows with a non-NULL primary key, in each converted table. The adoption keeps the rows in
            the table.
        moved: number of rows whose primary key is NULL. The adoption moves the rows to a new table. The keys of the
            dictionary are the names of the new tables.
        application_id: application id that the adoption replaces in the SQLite file. None on PostgreSQL.
        application_revision: revision in Alembic's table `alembic_version`. The adoption makes `alembic_version` the
            version table of the application's own revisions. None if the adoption does not rename `alembic_version`.
        backup: path of the backup that homeagent made before the first change. The value is None before the adoption,
            and for a PostgreSQL database. The value is also None for a file that already has homeagent's tables.
    """

    location: str
    tables: dict[str, int]
    converted: dict[str, int] = {}
    moved: dict[str, int] = {}
    application_id: int | None = None
    application_revision: str | None = None
    backup: Path | None = None


def preview_adoption(where: Target, application: Application) -> AdoptionReport | None:
    """Report the changes that an adoption would make, without making the changes.

    If the database does not exist or needs no adoption, return None. If a program was killed during a transaction,
    SQLite first undoes the transaction.
    """
    if where.url is not None:
        server = PostgreSQLEngine(where.url, busy_timeout=BUSY_TIMEOUT)
        with closing(server), server.translated(), server.connect() as connection, connection.begin():
            return _examine(connection, application, where.location)
    path = where.path
    if path is None or (state := inspect_file(path, is_database=False, repair=False)) is None or not state.st_size:
        return None
    for sidecar in sidecars(path):
        inspect_file(sidecar, is_database=False, repair=False)
    if look_at(sidecars(path)[2]) is not None:
        # Let SQLite undo a transaction that a killed program left unfinished.
        file = SQLiteEngine(path, busy_timeout=BUSY_TIMEOUT, durability="full")
        with closing(file), file.translated(), file.driver_connection() as raw:
            raw.execute("SELECT count(*) FROM sqlite_master").fetchall()
    with inspect_sqlite(path) as connection:
        report = _examine(connection, application, where.location)
        if report is not None and report.application_id != APPLICATION_ID:

            def rehearse(scratch: Connection) -> None:
                _add_tables(scratch, report)
                refuse_changed_schema(scratch, REVISION, quoted(path), application.acknowledged)

            refuse_broken_objects(connection, f"adopting {quoted(path)}", rehearse)
        return report


def adopt(where: Target, report: AdoptionReport, application: Application) -> AdoptionReport:
    """Create or upgrade homeagent's tables in the database, and run the application's missing revisions. If the
    database is a SQLite file, first make a backup.

    Return the report with the path of the backup. If the database has changed since the report, or if another program
    has the database open, raise DatabaseBusyError. A failed adoption changes nothing.
    """
    if where.path is not None:
        prepare_directory(where.path.parent)
        refuse_network_filesystem(where.path)
        if report.application_id != APPLICATION_ID:
            report = _adopt_file(where.path, report, application)
    open_engine(where.url or where.path, migrations=application).close()
    return report


def _examine(connection: Connection, application: Application, location: str) -> AdoptionReport | None:
    """Return the report, or None if the database needs no adoption."""
    is_sqlite = connection.dialect.name == "sqlite"
    application_id = connection.exec_driver_sql("PRAGMA application_id").scalar_one() if is_sqlite else None
    adopted = ", ".join(sorted(application.adopted_revisions(connection))) or None
    revision = revision_of(connection)
    is_homeagents = application_id == APPLICATION_ID if is_sqlite else revision is not None
    if is_homeagents and adopted is None:
        return None
    encoding = connection.exec_driver_sql("PRAGMA encoding").scalar_one() if is_sqlite else "UTF-8"
    if encoding != "UTF-8":
        # SQLite would sort and measure the bytes of UTF-16. homeagent's order and limits are those of UTF-8.
        raise ForeignDatabaseError(
            f"the texts of {location} are in {encoding}, and homeagent needs UTF-8: copy the database into a new file "
            "by 'sqlite3 OLD .dump | sqlite3 NEW', and adopt the new file. Nothing was changed"
        )
    found = tables(connection)
    old = [] if revision is not None or not is_sqlite else sorted(_FIRST_TABLES.keys() & found)
    moved: dict[str, int] = {}
    converted: dict[str, int] = {}
    for table in old:
        columns = [row[1] for row in connection.exec_driver_sql(f"PRAGMA table_xinfo({table})")]
        if sorted(columns) != sorted(_FIRST_TABLES[table]):
            raise ForeignDatabaseError(
                f"the table {table} in {location} has the name of homeagent's table, but other columns: give the table "
                "another name, or name another database. Nothing was changed"
            )
        key = _FIRST_TABLES[table][0]
        query = f"SELECT count(*), count({key}) FROM {table}"  # noqa: S608  constants
        rows, converted[table] = connection.execute(text(query)).one()
        if rows > converted[table]:
            moved[f"{table}_without_key"] = rows - converted[table]
    for (child, parent), orphans in broken_references(connection).items() if old else ():
        if child in _FIRST_TABLES:
            raise ForeignDatabaseError(
                f"{orphans:,} rows of {child} in {location} refer to rows of {parent} that do not exist: create the "
                "missing rows, or delete the rows that refer to them. Nothing was changed"
            )
    return AdoptionReport(
        location=location,
        tables=count_rows(
            connection, [name for name in own_tables(connection) if name not in (*old, adopted and ALEMBIC_TABLE)]
        ),
        converted=converted,
        moved=moved,
        application_id=application_id,
        application_revision=adopted,
    )


def _adopt_file(path: Path, report: AdoptionReport, application: Application) -> AdoptionReport:
    inspect_file(path, repair=False)
    with sidecar_lock(path, timeout=BUSY_TIMEOUT):
        with kept_from_sqlite(path):
            pass  # `kept_from_sqlite()` raises an error if another program has the file open
        with closing(SQLiteEngine(path, busy_timeout=BUSY_TIMEOUT, durability="full")) as engine:
            with engine.translated(), engine.driver_connection() as raw:
                # Without the WAL, the commit writes the application id into the file.
                raw.execute("PRAGMA journal_mode=DELETE")
            with upgrade_transaction(engine, f"adopting {quoted(path)}") as attempt:
                connection = attempt.connection
                if _examine(connection, application, report.location) != report:
                    raise DatabaseBusyError(
                        f"{quoted(path)} has changed since the report: stop the application that uses the file, and "
                        "begin again. Nothing was changed"
                    )
                attempt.backup = back_up(engine, "adoption", system_clock, kind="adoption")
                _add_tables(connection, report)
                application.upgrade(connection)
                refuse_changed_schema(connection, REVISION, quoted(path), application.acknowledged)
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    return report.model_copy(update={"backup": attempt.backup})


def _add_tables(connection: Connection, report: AdoptionReport) -> None:
    """Create or upgrade homeagent's tables. Preserve the application's indexes and triggers."""
    revision = revision_of(connection)
    with kept_objects(connection, revision or _FIRST):
        if revision is None:
            _convert(connection, report)
        upgrade(connection)


def _convert(connection: Connection, report: AdoptionReport) -> None:
    execute = connection.exec_driver_sql
    for table in report.converted:
        # Do not rename the table. A rename would also change the references in views and other tables.
        execute(f"CREATE TABLE _adopted_{table} AS SELECT * FROM {table}")  # noqa: S608  the names are constants
        execute(f"DROP TABLE {table}")
    upgrade(connection, _FIRST)
    for table in report.converted:
        # The report's names are safe in SQL, because `_adopt_file()` checks the report.
        columns = ", ".join(_FIRST_TABLES[table])
        key = _FIRST_TABLES[table][0]
        # All names in the two statements are constants of this module.
        execute(
            f"INSERT INTO {table} ({columns}) SELECT {columns} FROM _adopted_{table} WHERE {key} IS NOT NULL"  # noqa: S608
        )
        if f"{table}_without_key" in report.moved:
            execute(f"CREATE TABLE {table}_without_key AS SELECT * FROM _adopted_{table} WHERE {key} IS NULL")  # noqa: S608
        execute(f"DROP TABLE _adopted_{table}")
    refuse_unconvertible_rows(connection, _FIRST)
