"""Create or upgrade the schema on a PostgreSQL server, from one host at a time, while other hosts continue to work."""

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

_ADVISORY_LOCK = 0x686F6D656167656E  # bytes of "homeagen". Each host that upgrades takes this lock

# Longest wait of a revision for a table's lock, in seconds. After this time the whole upgrade is rolled back and tried
# again, because readers and writers of the table wait behind a waiting revision.
_TABLE_LOCK_PATIENCE = 2

# Longest time for a statement of a revision. The time is limited, because a revision holds locks.
_STATEMENT_PATIENCE = timedelta(minutes=15)

_STATEMENT_CANCELLED = "57014"

# The engine replaces the current search_path. The column `reset_val` still has the search_path of the URL, the role or
# the database.
_OTHER_STORES = text(
    "SELECT schemaname FROM pg_catalog.pg_tables WHERE tablename = :name AND schemaname = ANY (current_schemas(false))"
    " AND schemaname <> current_schema() AND current_schema() = current_user"
    """ AND EXISTS (SELECT FROM pg_catalog.pg_settings WHERE name = 'search_path' AND reset_val LIKE '%"$user"%')"""
)
_PAUSE = 0.2  # longest pause between two attempts, in seconds


def open_postgresql(engine: PostgreSQLEngine, *, timeout: timedelta, migrate: bool) -> None:
    """If `migrate` is True, bring the schema to this version's revision, one host at a time.

    If `migrate` is False, the schema must be up to date. The argument `timeout` is the longest wait for another host
    that upgrades the schema, and for units that hold locks of its tables.

    Raises:
        SchemaTooNewError, SchemaOutdatedError, MigrationError, ForeignDatabaseError, DatabaseBusyError: the schema
            can't be used or upgraded. A failed upgrade is undone.
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
                        # A revision must not use tables of another store in a later schema of the search_path.
                        connection.execute(text(f"SET LOCAL {engine.search_schema}"))
                    _make_or_upgrade(connection, deadline)
                    return
            except TransientError as error:
                busy = error
            except SPEAK_FOR_THEMSELVES:
                raise
            except Exception as error:  # noqa: BLE001  a revision can raise any error, and was rolled back
                raise MigrationError(
                    f"upgrading the schema from {revision!r} failed and was undone ({reason_of(error)})"
                ) from (None if isinstance(error, engine.driver_errors) else error)
            if busy.sqlstate == _STATEMENT_CANCELLED:
                raise MigrationError(
                    f"upgrading the schema from {revision!r} was cancelled and undone: a statement took longer than "
                    f"{_STATEMENT_PATIENCE}, or the administrator cancelled it. Try again when the server is less busy"
                )
            if monotonic() >= deadline:
                raise DatabaseBusyError(
                    f"the schema could not be upgraded from {revision!r} within {timeout}: another host upgrades it, "
                    "or a unit holds a table. End long transactions and open the database again, or raise busy_timeout"
                )
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  spreads the attempts of several hosts; not a secret


def refuse_second_store(connection: Connection) -> None:
    """Refuse a store in the schema with the name of the role if a later schema of the `search_path` also has a store.

    By default PostgreSQL searches the schema with the name of the role before `public`. A role with the right CREATE on
    the database can create this schema, with tables that contain an approved device. The next start would use these
    tables.

    Raises:
        InvalidArgumentError: the search_path contains `"$user"`, and two of its schemas have a store.
    """
    others = connection.execute(_OTHER_STORES, {"name": VERSION_TABLE}).scalars().all()
    if others:
        raise InvalidArgumentError(
            "the search_path leads first to the schema with the name of the role, and the schema "
            f"{', '.join(others)} holds homeagent's tables too: name the right schema, by "
            "?options=-csearch_path%3DSCHEMA in the URL or by ALTER ROLE … SET search_path = SCHEMA"
        )


def _make_or_upgrade(connection: Connection, deadline: float) -> None:
    """Create or upgrade the schema in the current transaction, unless another host has done so already."""
    left = max(1, int((deadline - monotonic()) * 1000))
    connection.execute(text(f"SET LOCAL lock_timeout = {left}"))
    # Wait without statement_timeout, because the upgrade of another host can take longer than the role's timeout.
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    revision = revision_of(connection)
    if suits(connection, revision):
        return
    if connection.execute(text("SELECT current_schema()")).scalar_one() is None:
        raise InvalidArgumentError(
            "the search_path leads to no schema, so homeagent can't create tables: CREATE SCHEMA, or ALTER ROLE … SET "
            "search_path to an existing schema"
        )
    if revision is None and tables(connection) & {"devices", "agents", "sessions", "nonces"}:
        raise ForeignDatabaseError(
            "the schema holds another application's tables with the names of homeagent's tables: name another database "
            "or schema"
        )
    if revision is not None:
        refuse_changed_schema(connection, revision, presentable_url(connection.engine.url))
    connection.execute(text(f"SET LOCAL lock_timeout = {min(left, _TABLE_LOCK_PATIENCE * 1000)}"))
    connection.execute(text(f"SET LOCAL statement_timeout = {int(_STATEMENT_PATIENCE.total_seconds() * 1000)}"))
    upgrade(connection)
    # COMMIT can wait longer than a statement, for example for a standby.
    connection.execute(text("SET LOCAL statement_timeout = 0"))
