"""The schema on a PostgreSQL server is made or upgraded: by one host at a time, while the others go on working."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from homeagent.clock import monotonic
from homeagent.engine.target import presentable_url
from homeagent.errors import (
    DatabaseBusyError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
    SchemaOutdatedError,
    TransientError,
)
from homeagent.migrations.revisions import (
    REVISION,
    SPEAK_FOR_THEMSELVES,
    VERSION_TABLE,
    reason_of,
    revision_of,
    suits,
    tables,
    upgrade,
)
from homeagent.migrations.schema_drift import refuse_changed_schema

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.postgresql.engine import PostgreSQLEngine

__all__ = ["open_postgresql", "refuse_second_store"]

_ADVISORY_LOCK = 0x686F6D656167656E  # "homeagen": one lock for all who upgrade one database

# How long a revision waits for the lock of a table, in seconds, before the whole upgrade steps back and tries again:
# whoever comes after it to read or write that table waits in line behind it.
_TABLE_LOCK_PATIENCE = 2

# A statement of a revision that takes longer than this has gone wrong, and holds locks.
_STATEMENT_PATIENCE = timedelta(minutes=15)

_STATEMENT_CANCELLED = "57014"

# `reset_val` is what the URL, the role or the database asks for: the engine has replaced the setting itself.
_OTHER_STORES = text(
    "SELECT schemaname FROM pg_catalog.pg_tables WHERE tablename = :name AND schemaname = ANY (current_schemas(false))"
    " AND schemaname <> current_schema() AND current_schema() = current_user"
    """ AND EXISTS (SELECT FROM pg_catalog.pg_settings WHERE name = 'search_path' AND reset_val LIKE '%"$user"%')"""
)
_PAUSE = 0.2  # seconds; the longest between two tries


def open_postgresql(engine: PostgreSQLEngine, *, timeout: timedelta, migrate: bool) -> None:
    """Bring the schema to this version's revision, one host at a time.

    Args:
        engine: on the database.
        timeout: how long to wait for another host that upgrades it, and for units that hold its tables.
        migrate: whether it may be made or upgraded.

    Raises:
        SchemaTooNewError, SchemaOutdatedError, MigrationError, ForeignDatabaseError, DatabaseBusyError.
    """
    deadline = monotonic() + timeout.total_seconds()
    with engine.translated(), engine.connect() as connection:
        with connection.begin():
            refuse_second_store(connection)
            revision = revision_of(connection)
            if suits(connection, revision):
                return
        if not migrate:
            location = presentable_url(engine.sa_engine.url)
            raise SchemaOutdatedError(revision, needed=REVISION, location=location)
        while True:
            try:
                with connection.begin():
                    if engine.search_schema is not None:
                        # A revision must not find the tables of another store in a later schema of the path.
                        connection.execute(text(f"SET LOCAL {engine.search_schema}"))
                    _make_or_upgrade(connection, deadline)
                    return
            except TransientError as error:
                busy = error
            except SPEAK_FOR_THEMSELVES:
                raise
            except Exception as error:  # noqa: BLE001  whatever a revision raises, the upgrade failed and was undone
                raise MigrationError(
                    f"upgrading the schema from {revision!r} failed and was undone ({reason_of(error)})"
                ) from (None if isinstance(error, engine.driver_errors) else error)
            if busy.sqlstate == _STATEMENT_CANCELLED:
                raise MigrationError(
                    f"upgrading the schema from {revision!r} was cancelled and undone: a statement took longer than "
                    f"{_STATEMENT_PATIENCE}, or somebody cancelled it; try it when the server has less to do"
                )
            if monotonic() >= deadline:
                raise DatabaseBusyError(
                    f"the schema could not be upgraded from {revision!r} within {timeout}: another host upgrades it, "
                    "or a unit holds a table. Open it again later, end long transactions first, or raise busy_timeout"
                )
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  it parts the hosts, it keeps no secret


def refuse_second_store(connection: Connection) -> None:
    """Refuse a store in the schema with the name of the role if a later schema of the `search_path` holds one as well.

    By default PostgreSQL searches the schema with the name of the role before `public`. A role with the right CREATE on
    the database can create this schema, with tables that let a device in, and the next start would use them.

    Raises:
        InvalidArgumentError: if the path names no schema and leads to two stores.
    """
    others = connection.execute(_OTHER_STORES, {"name": VERSION_TABLE}).scalars().all()
    if others:
        raise InvalidArgumentError(
            "the schema with the name of the role was found first, and the schema "
            f"{', '.join(others)} holds homeagent's tables too: name the right schema, by "
            "?options=-csearch_path%3DSCHEMA in the URL or by ALTER ROLE … SET search_path = SCHEMA"
        )


def _make_or_upgrade(connection: Connection, deadline: float) -> None:
    """Upgrade within the transaction that has begun, or find that another host did."""
    left = max(1, int((deadline - monotonic()) * 1000))
    connection.execute(text(f"SET LOCAL lock_timeout = {left}"))
    # Another host may take longer than the role lets a statement take.
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    revision = revision_of(connection)
    if suits(connection, revision):
        return
    if connection.execute(text("SELECT current_schema()")).scalar_one() is None:
        raise InvalidArgumentError(
            "the search_path leads to no schema, so that no table can be made: CREATE SCHEMA, or ALTER ROLE … SET "
            "search_path to one that is there"
        )
    if revision is None and tables(connection) & {"devices", "agents", "sessions", "nonces"}:
        raise ForeignDatabaseError(
            "the schema holds tables of these names that are not ours: name another database or schema"
        )
    if revision is not None:
        refuse_changed_schema(connection, revision, presentable_url(connection.engine.url))
    connection.execute(text(f"SET LOCAL lock_timeout = {min(left, _TABLE_LOCK_PATIENCE * 1000)}"))
    connection.execute(text(f"SET LOCAL statement_timeout = {int(_STATEMENT_PATIENCE.total_seconds() * 1000)}"))
    upgrade(connection)
    # What COMMIT waits for, a standby for example, is no statement that has gone wrong.
    connection.execute(text("SET LOCAL statement_timeout = 0"))
