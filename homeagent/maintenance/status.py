"""State of a database for `Database.status` and `homeagent status`."""

from __future__ import annotations

import stat
from datetime import datetime
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text

from homeagent.engine.counters import DatabaseCounters
from homeagent.engine.engine import Engine
from homeagent.engine.files.database_file import sidecars
from homeagent.engine.sqlite.dialect import APSW_VERSION, SQLITE_VERSION
from homeagent.engine.sqlite.engine import SQLiteEngine, lock_path
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.engine.target import presentable_url
from homeagent.migrations import revision_of
from homeagent.migrations.revisions import count_rows, own_tables, stored_revisions
from homeagent.models import APPLICATION_VERSION_TABLE, DATA_TABLES
from homeagent.stores.idempotency_key_statements import COUNT_EXPIRED as EXPIRED_KEYS
from homeagent.stores.nonces import COUNT_EXPIRED as EXPIRED_NONCES
from homeagent.stores.nonces import FIND_RECORD
from homeagent.unit_of_work import UnitOfWork

_PRAGMAS = (
    "journal_mode",
    "foreign_keys",
    "synchronous",
    "busy_timeout",
    "trusted_schema",
    "cell_size_check",
    "journal_size_limit",
    "wal_autocheckpoint",
    "page_size",
    "application_id",
)


class DatabaseStatus(BaseModel, frozen=True):
    """The current state of a database.

    Attributes:
        engine: name of the engine, `sqlite` or `postgresql`.
        location: path of the file, or URL of the server without the password.
        engine_version: version of SQLite or of the PostgreSQL server.
        driver: Python package of the driver, `apsw` or `psycopg`.
        driver_version: version of the driver.
        schema_revision: revision of the schema.
        epoch: number of the epoch; the first epoch has number 1. A restore or `begin_epoch()` increments the epoch.
            When the epoch changes, the application must read cached data again.
        restored_at: start of the epoch, or None in the first epoch.
        durability: "full" or "normal" (see `Database.open`). None for a PostgreSQL server, which has its own setting.
        pragmas: values of SQLite's settings on a new connection, by name.
        file_modes: octal permission bits of the directory and database files, by file name.
        rows: number of rows by table name. First come homeagent's tables, then the application's tables.
        application_revision: revision of the application's own tables, or None without revisions.
        expired: number of expired rows that a sweep has not deleted, by table name.
        wal_bytes: size of the write-ahead log in bytes, or None for PostgreSQL.
        counters: counters of this process since the database was opened.
    """

    engine: str
    location: str
    engine_version: str
    driver: str
    driver_version: str
    schema_revision: str | None
    application_revision: str | None = None
    epoch: int = 1
    restored_at: datetime | None = None
    durability: str | None = None
    pragmas: dict[str, int | str] = {}
    file_modes: dict[str, str] = {}
    rows: dict[str, int]
    expired: dict[str, int]
    wal_bytes: int | None = None
    counters: DatabaseCounters


def report_status(engine: Engine, unit: UnitOfWork) -> DatabaseStatus:
    """Return the state of an open database in the unit's snapshot."""
    connection = unit.session.connection()
    now = unit.now()
    facts: dict[str, Any] = {
        "rows": count_rows(connection, (*DATA_TABLES, *own_tables(connection))),
        "expired": {
            "nonces": unit.one(EXPIRED_NONCES, before=now) or 0,
            "idempotency_keys": unit.one(EXPIRED_KEYS, now=now) or 0,
        },
        "schema_revision": revision_of(connection),
        "application_revision": ", ".join(sorted(stored_revisions(connection, APPLICATION_VERSION_TABLE))) or None,
        "engine": engine.dialect_name,
        "counters": engine.counters.snapshot(),
    }
    record = unit.one(FIND_RECORD)
    if record is not None:
        facts["epoch"], facts["restored_at"] = record
    if isinstance(engine, SQLiteEngine):
        return DatabaseStatus(**facts, **_sqlite_facts(engine))
    with engine.connect() as connection:
        engine_version = connection.execute(text("SHOW server_version")).scalar_one()
    return DatabaseStatus(
        **facts,
        engine_version=str(engine_version),
        driver="psycopg",
        driver_version=version("psycopg"),
        location=presentable_url(engine.sa_engine.url),
    )


def _sqlite_facts(engine: SQLiteEngine) -> dict[str, Any]:
    with engine.reading() as connection:
        pragmas = {name: connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in _PRAGMAS}
    path = engine.path
    files = [path.parent, path, *sidecars(path), lock_path(path), in_use_path(path)]
    wal = sidecars(path)[0]
    return {
        "location": str(path),
        "engine_version": SQLITE_VERSION,
        "driver": "apsw",
        "driver_version": APSW_VERSION,
        "durability": engine.durability,
        "pragmas": pragmas,
        "file_modes": {file.name: f"{stat.S_IMODE(file.lstat().st_mode):04o}" for file in files if file.exists()},
        "wal_bytes": wal.stat().st_size if wal.exists() else 0,
    }
