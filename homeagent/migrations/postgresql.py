"""Create or upgrade the schema on a PostgreSQL server. Other hosts continue to work."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from homeagent.clock import monotonic
from homeagent.engine.postgresql.connection import POOLED
from homeagent.engine.target import presentable_url
from homeagent.errors import (
    DatabaseBusyError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
    SchemaOutdatedError,
    TransientError,
)
from homeagent.migrations.application import NO_APPLICATION, Application
from homeagent.migrations.revisions import (
    REVISION,
    SPEAK_FOR_THEMSELVES,
    RevisionFailedError,
    reason_of,
    revision_of,
    suits,
    tables,
    upgrade,
)
from homeagent.migrations.schema_drift import refuse_changed_schema, views_of_tables
from homeagent.models import TABLES, VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.postgresql.engine import PostgreSQLEngine

# Key of the advisory lock for upgrades: the bytes of "homeagen".
_ADVISORY_LOCK = 0x686F6D656167656E
# Key of a second advisory lock, for revisions outside a transaction. Alembic's commands acquire only the second lock.
_OUTSIDE_LOCK = _ADVISORY_LOCK + 1

# Longest wait of a revision for a table's lock, in seconds. During the wait, new readers and writers of the table also
# wait.
_TABLE_LOCK_PATIENCE = 2

# Longest time for a statement of a revision.
_STATEMENT_PATIENCE = timedelta(minutes=15)

_STATEMENT_CANCELLED = "57014"

# The engine changes the session's search_path, but `reset_val` keeps the original value.
_OTHER_STORES = text(
    "SELECT schemaname FROM pg_catalog.pg_tables WHERE tablename = :name AND schemaname = ANY (current_schemas(false))"
    " AND schemaname <> current_schema() AND current_schema() = current_user"
    """ AND EXISTS (SELECT FROM pg_catalog.pg_settings WHERE name = 'search_path' AND reset_val LIKE '%"$user"%')"""
)
_PAUSE = 0.2  # longest pause between two attempts, in seconds


def open_postgresql(
    engine: PostgreSQLEngine, *, timeout: timedelta, migrate: bool, application: Application = NO_APPLICATION
) -> None:
    """Create the schema, or upgrade the schema to this version's revision. Only one host at a time runs revisions. With
    `migrate=False`, raise an error if a revision is missing.
    """
    deadline = monotonic() + timeout.total_seconds()
    with engine.translated(), engine.connect() as connection:
        with connection.begin():
            refuse_second_store(connection)
            revision = revision_of(connection)
            suitable, pending = suits(connection, revision), application.is_pending(connection)
            if suitable and not pending:
                return
            if suitable and not migrate:
                raise application.outdated(connection)
        if not migrate:
            location = presentable_url(engine.sa_engine.url)
            raise SchemaOutdatedError(revision, needed=REVISION, location=location)
        while True:
            try:
                with connection.begin():
                    _set_for_upgrade(engine, connection)
                    _make_or_upgrade(engine, connection, deadline, application)
                    return
            except TransientError as error:
                busy = error
            except SPEAK_FOR_THEMSELVES:
                raise
            except Exception as error:  # noqa: BLE001  a revision can raise any error, and was rolled back
                by_application = isinstance(error, RevisionFailedError)
                cause = error.__cause__ if by_application else error
                before = "" if by_application else f" from {revision!r}"  # the application's error names its revision
                outcome = error.outcome if isinstance(error, RevisionFailedError) else "failed and was undone"
                raise MigrationError(
                    f"upgrading the schema{before} {outcome} ({reason_of(error)}){_views(connection)}"
                ) from (None if isinstance(cause, engine.driver_errors) else cause)
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
    """Raise an error if the role's own schema hides homeagent's schema.

    By default PostgreSQL first searches a schema with the role's name. Another role with the privilege CREATE could
    create such a schema. The false schema could contain an approved device.
    """
    others = connection.execute(_OTHER_STORES, {"name": VERSION_TABLE}).scalars().all()
    if others:
        raise InvalidArgumentError(
            "the search_path leads first to the schema with the name of the role, and the schema "
            f"{', '.join(others)} holds homeagent's tables too: name the right schema, by "
            "?options=-csearch_path%3DSCHEMA in the URL or by ALTER ROLE … SET search_path = SCHEMA"
        )


def _views(connection: Connection) -> str:
    """Return a hint about views, which can prevent changes of homeagent's tables."""
    if connection.closed:
        return ""  # a revision can close the connection
    with connection.begin():
        names = sorted({difference.text for difference in views_of_tables(connection)})
    hint = ": PostgreSQL can refuse to change such a table. Drop the view, upgrade, and create the view again"
    return f"; {'; '.join(names)}{hint}" if names else ""


def _set_for_upgrade(engine: PostgreSQLEngine, connection: Connection) -> None:
    """Set the schema, and switch off statement_timeout. The caller must begin the transaction."""
    if engine.search_schema is not None:
        # A revision must not use the tables of a second store.
        connection.execute(text(f"SET LOCAL {engine.search_schema}"))
    # Another host's upgrade can take longer than the role's statement_timeout.
    connection.execute(text("SET LOCAL statement_timeout = 0"))


def _set_for_revisions(connection: Connection, left: int) -> None:
    """Set the time limits of the open transaction. Pass the remaining time in milliseconds."""
    connection.execute(text(f"SET LOCAL lock_timeout = {min(left, _TABLE_LOCK_PATIENCE * 1000)}"))
    connection.execute(text(f"SET LOCAL statement_timeout = {int(_STATEMENT_PATIENCE.total_seconds() * 1000)}"))


def _make_or_upgrade(
    engine: PostgreSQLEngine, connection: Connection, deadline: float, application: Application
) -> None:
    left = max(1, int((deadline - monotonic()) * 1000))
    connection.execute(text(f"SET LOCAL lock_timeout = {left}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    revision = revision_of(connection)
    suitable = suits(connection, revision)
    if suitable and not application.is_pending(connection):
        return
    if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _OUTSIDE_LOCK}).scalar_one():
        # Do not wait for `_OUTSIDE_LOCK`: the wait could deadlock with CREATE INDEX CONCURRENTLY.
        raise TransientError("another host runs a revision outside a transaction")
    if connection.execute(text("SELECT current_schema()")).scalar_one() is None:
        raise InvalidArgumentError(
            "the search_path leads to no schema, so homeagent can't create tables: CREATE SCHEMA, or ALTER ROLE … SET "
            "search_path to an existing schema"
        )
    foreign = sorted(tables(connection) & set(TABLES)) if revision is None else []
    if foreign:
        raise ForeignDatabaseError(
            "the schema holds another application's tables with the names of homeagent's tables "
            f"({', '.join(foreign)}): name another database or schema, or give the tables other names"
        )
    if revision is not None and not suitable:
        location = presentable_url(connection.engine.url)
        refuse_changed_schema(connection, revision, location, application.acknowledged)
    _set_for_revisions(connection, left)
    if not suitable:
        upgrade(connection)
    application.upgrade(connection, lambda: _outside_transaction(engine, connection, left))
    # COMMIT can exceed the time limit if the server waits for a standby.
    connection.execute(text("SET LOCAL statement_timeout = 0"))


@contextmanager
def upgrade_lock(engine: PostgreSQLEngine, timeout: timedelta) -> Iterator[None]:
    """Prevent upgrades by other hosts and other Alembic commands during the block."""
    deadline = monotonic() + timeout.total_seconds()
    with engine.translated(), engine.connect() as connection:
        while True:
            # Do not let a statement wait for the lock. The statement could deadlock with CREATE INDEX CONCURRENTLY. An
            # idle transaction (READ COMMITTED) does not block CREATE INDEX CONCURRENTLY.
            with connection.begin():
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                if connection.execute(text(f"SELECT pg_try_advisory_xact_lock({_OUTSIDE_LOCK})")).scalar_one():
                    yield
                    return
            if monotonic() >= deadline:
                raise DatabaseBusyError(
                    f"the schema could not be locked within {timeout}: another host or command upgrades it. Try again"
                )
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  spreads the attempts of several hosts; not a secret


@contextmanager
def _outside_transaction(engine: PostgreSQLEngine, connection: Connection, left: int) -> Iterator[None]:
    """Commit, run the block outside a transaction, and begin a new transaction.

    Do not hold `_ADVISORY_LOCK` during the block. Other hosts would wait, and could deadlock with CREATE INDEX
    CONCURRENTLY.
    """
    if connection.info[POOLED]:
        raise MigrationError(
            "a revision leaves its transaction (autocommit_block), which is not safe through a pooler: open the "
            "database once with a URL that leads directly to the server"
        )
    raw: Any = connection.connection.driver_connection
    # SQLAlchemy must not notice the end of the transaction.
    raw.execute(f"SELECT pg_advisory_lock({_OUTSIDE_LOCK})")
    if engine.search_schema is not None:
        raw.execute(f"SET {engine.search_schema}")
    raw.execute("SET statement_timeout = 0")
    raw.execute("COMMIT")
    try:
        yield
    finally:
        raw.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        _set_for_upgrade(engine, connection)
        # Keep the session's `_OUTSIDE_LOCK` until the transaction also holds `_OUTSIDE_LOCK`. Otherwise another host
        # could take the lock.
        raw.execute(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK}), pg_advisory_xact_lock({_OUTSIDE_LOCK})")
        raw.execute(f"SELECT pg_advisory_unlock({_OUTSIDE_LOCK})")
        _set_for_revisions(connection, left)
