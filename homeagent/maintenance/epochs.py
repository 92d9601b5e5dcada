"""Begin a new epoch after another tool restored the store."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timedelta
from time import sleep
from typing import TYPE_CHECKING

from pydantic import BaseModel
from sqlalchemy import URL, select, text, update

from homeagent.clock import monotonic
from homeagent.engine.files.database_file import look_at
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.diagnosis import naming_newest_backup
from homeagent.engine.sqlite.engine import SQLiteEngine, sidecar_lock
from homeagent.engine.sqlite.in_use import alone, epoch_of_marker, kept_from_sqlite, marker_of_epoch
from homeagent.engine.target import Given, resolve_target
from homeagent.errors import (
    ConflictError,
    CorruptDatabaseError,
    DatabaseBusyError,
    InvalidArgumentError,
    SchemaOutdatedError,
)
from homeagent.migrations import REVISION
from homeagent.migrations.postgresql import open_postgresql
from homeagent.migrations.sqlite import identify_or_wait, open_sqlite
from homeagent.models import store_table
from homeagent.models.types import check_timestamp, check_wait

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection

    from homeagent.clock import Clock

# Count homeagent's other connections to the server. A process with an open connection would continue in the old epoch.
_OTHERS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND application_name = 'homeagent'"
)
_ENDING = 1.0  # PostgreSQL lists the session of a closed connection for a moment. This is the longest wait in seconds.


class EpochReport(BaseModel, frozen=True):
    """Report about the new epoch of a store.

    Attributes:
        location: path of the file, or URL of the server without the password.
        epoch: number of the epoch.
        restored_at: start of the epoch. A replay guard accepts only timestamps after `restored_at + skew` (see
            `ReplayGuard`).
    """

    location: str
    epoch: int
    restored_at: datetime


def check_expected_epoch(epoch: int | None) -> None:
    """Raise InvalidArgumentError if the argument `expected_epoch=` is neither None nor a whole number."""
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise InvalidArgumentError("expected_epoch must be a whole number from 0, or None for any epoch")


def begin_epoch(
    target: Given, *, clock: Clock, busy_timeout: timedelta, expected_epoch: int | None = None
) -> EpochReport:
    """Begin a new epoch of a closed store (see `Database.begin_epoch`)."""
    busy_timeout = check_wait(busy_timeout, "busy_timeout", zero=True)
    check_expected_epoch(expected_epoch)
    where = resolve_target(target)
    now = check_timestamp(clock(), "the clock's time")
    if where.url is not None:
        epoch = _on_server(where.url, now, busy_timeout, expected_epoch)
    elif where.path is None:
        raise InvalidArgumentError("a temporary database has only one epoch: name a file, or a server's URL")
    else:
        epoch = _in_file(where.path, now, busy_timeout, expected_epoch)
    return EpochReport(location=where.location, epoch=epoch, restored_at=now)


def _in_file(path: Path, now: datetime, timeout: timedelta, expected: int | None) -> int:
    if look_at(path) is None:
        raise SchemaOutdatedError(None, needed=REVISION, location=str(path))
    with closing(SQLiteEngine(path, busy_timeout=timeout, durability="full")) as engine:
        with naming_newest_backup(path):
            identify_or_wait(engine)
        with alone(path, timeout=timeout):
            with kept_from_sqlite(path):
                pass  # `kept_from_sqlite()` raises an error if another program has the file open.
            # The context manager `alone()` already holds the in-use lock. With `temporary=True`, `open_sqlite()` does
            # not take the lock again.
            open_sqlite(engine, clock=lambda: now, timeout=timeout, migrate=False, temporary=True)
            with sidecar_lock(path, timeout=timeout) as lock:
                with engine.translated(), engine.connect() as connection, connection.begin():
                    known = epoch_of_marker(lock.read_marker())
                    epoch = _advance(connection, now, at_least=known, expected=expected)
                lock.write_marker(marker_of_epoch(epoch))
    return epoch


def _on_server(url: URL, now: datetime, timeout: timedelta, expected: int | None) -> int:
    with closing(PostgreSQLEngine(url, busy_timeout=timeout)) as engine:
        open_postgresql(engine, timeout=timeout, migrate=False)
        with engine.translated(), engine.connect() as connection, connection.begin():
            # Let other connections end before LOCK TABLE. The lock would stop a running gateway.
            end = monotonic() + min(timeout.total_seconds(), _ENDING)
            while _count_others(connection) and monotonic() < end:
                sleep(0.02)
            _refuse_others(connection)
            # A later process waits for the lock, and reads the new epoch.
            connection.execute(text(f"LOCK TABLE {store_table.name} IN ACCESS EXCLUSIVE MODE"))
            _refuse_others(connection)
            return _advance(connection, now, at_least=0, expected=expected)


def _count_others(connection: Connection) -> int:
    """Return the present number of homeagent's other sessions on the server."""
    connection.execute(text("SELECT pg_stat_clear_snapshot()"))
    return int(connection.execute(text(_OTHERS)).scalar_one())


def _refuse_others(connection: Connection) -> None:
    """Raise DatabaseBusyError if another session of homeagent is open."""
    if others := _count_others(connection):
        raise DatabaseBusyError(
            f"{others} session(s) of homeagent have the database open and would continue in the old epoch: "
            "stop the gateways first"
        )


def _advance(connection: Connection, now: datetime, *, at_least: int, expected: int | None) -> int:
    """Store and return a new epoch. The new epoch is above the stored epoch and above `at_least=`. The caller must keep
    other processes out.
    """
    known = connection.execute(select(store_table.c.epoch)).scalar_one_or_none()
    if known is None:
        raise CorruptDatabaseError("the table `store` has no row: restore the newest good backup")
    if expected not in (None, known):
        raise ConflictError(
            f"the database has epoch {known}, but epoch {expected} was expected: check that no other program has begun "
            "the new epoch. The database was not changed"
        )
    epoch = max(int(known), at_least) + 1
    connection.execute(update(store_table).values(epoch=epoch, restored_at=now))
    return epoch
