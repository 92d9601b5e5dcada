"""What a database says of itself: `Database.status` and `homeagent status`."""

from __future__ import annotations

import stat
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import text

from homeagent.engine.engine import Engine
from homeagent.engine.files.database_file import sidecars
from homeagent.engine.sqlite.dialect import APSW_VERSION, SQLITE_VERSION
from homeagent.engine.sqlite.engine import SQLiteEngine, lock_path
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.engine.target import presentable_url
from homeagent.migrations import revision_of
from homeagent.models import DATA_TABLES
from homeagent.stores.idempotency_keys import COUNT_EXPIRED as EXPIRED_KEYS
from homeagent.stores.nonces import COUNT_EXPIRED as EXPIRED_NONCES
from homeagent.stores.nonces import FIND_RECORD
from homeagent.unit_of_work import UnitOfWork

__all__ = ["DatabaseCounters", "DatabaseStatus", "LastFault", "report_counters", "report_status"]

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


class LastFault(BaseModel):
    """The last fault of the engine; what an application is refused is none.

    Attributes:
        kind: the name of its class, such as `DiskFullError`.
        message: what it says; it holds no value of a row.
        at: when, by the system's clock.
    """

    model_config = ConfigDict(frozen=True, from_attributes=True)

    kind: str
    message: str
    at: datetime


class DatabaseCounters(BaseModel):
    """What one open database did since it was opened, in this process alone.

    Attributes:
        units: units that ended: `reads`, `commits` and `rollbacks` together.
        reads: read-only units.
        commits: write units that were committed; those that shared a commit count each.
        rollbacks: write units that were undone.
        retries: how often a unit was run again.
        pool_waits: how often a caller had to wait for a connection of the pool (for a writer: for the write lock).
        pool_wait_p50: how long such a caller waited, in seconds: the median of the last 1,024; None where none did.
        pool_wait_p99: likewise, what 99 of 100 did not exceed.
        groups: commits that two units or more shared.
        group_size_p50: how many units shared one: the median of the last 1,024; None where none did.
        group_size_p99: likewise, what 99 of 100 did not exceed.
        sweeps: sweeps that ended.
        swept: rows that they removed.
        last_error: the last fault of the engine; None where there was none.
    """

    model_config = ConfigDict(frozen=True, from_attributes=True)

    units: int = 0
    reads: int = 0
    commits: int = 0
    rollbacks: int = 0
    retries: int = 0
    pool_waits: int = 0
    pool_wait_p50: float | None = None
    pool_wait_p99: float | None = None
    groups: int = 0
    group_size_p50: int | None = None
    group_size_p99: int | None = None
    sweeps: int = 0
    swept: int = 0
    last_error: LastFault | None = None

    @property
    def lane_waits(self) -> int:
        """Return `pool_waits`, under its former name."""
        return self.pool_waits

    @property
    def lane_wait_p50(self) -> float | None:
        """Return `pool_wait_p50`, under its former name."""
        return self.pool_wait_p50

    @property
    def lane_wait_p99(self) -> float | None:
        """Return `pool_wait_p99`, under its former name."""
        return self.pool_wait_p99


class DatabaseStatus(BaseModel):
    """A database as it is now.

    Attributes:
        engine: `sqlite` or `postgresql`.
        location: the file, or the server's URL without its password.
        engine_version: the library's or the server's.
        driver: the Python package that connects to it, `apsw` or `psycopg`.
        driver_version: the version of that package.
        schema_revision: the revision of the schema.
        epoch: 1 at first, and one more with every restore; who remembers another one has to look again.
        restored_at: when the epoch began; None in the first.
        durability: `full` or `normal`; None for a server, which decides itself.
        pragmas: SQLite's settings of a connection that writes.
        file_modes: the permission bits of the directory, the file and what lies beside it, in octal.
        rows: how many rows each table of the application's holds.
        expired: rows that are dead and wait for cleanup.
        wal_bytes: the size of the write-ahead log; None for a server.
        counters: what this process did with it since it opened it.
    """

    model_config = ConfigDict(frozen=True)

    engine: str
    location: str
    engine_version: str
    driver: str
    driver_version: str
    schema_revision: str | None
    epoch: int = 1
    restored_at: datetime | None = None
    durability: str | None = None
    pragmas: dict[str, int | str] = {}
    file_modes: dict[str, str] = {}
    rows: dict[str, int]
    expired: dict[str, int]
    wal_bytes: int | None = None
    counters: DatabaseCounters = DatabaseCounters()


def report_counters(engine: Engine) -> DatabaseCounters:
    """Return what was done with an open database so far."""
    return DatabaseCounters.model_validate(engine.counters.snapshot())


def report_status(engine: Engine, unit: UnitOfWork) -> DatabaseStatus:
    """Describe an open database, as one read-only unit sees it."""
    rows = {
        # The names are those of our own tables.
        name: int(unit.session.connection().execute(text(f"SELECT count(*) FROM {name}")).scalar_one())  # noqa: S608
        for name in DATA_TABLES
    }
    now = unit.now()
    facts: dict[str, Any] = {
        "rows": rows,
        "expired": {
            "nonces": unit.one(EXPIRED_NONCES, before=now) or 0,
            "idempotency_keys": unit.one(EXPIRED_KEYS, now=now) or 0,
        },
        "schema_revision": revision_of(unit.session.connection()),
        "engine": engine.dialect_name,
        "counters": report_counters(engine),
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
    with engine.looking() as connection:
        pragmas = {name: connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in _PRAGMAS}
    path = engine.path
    beside = [path.parent, path, *sidecars(path), lock_path(path), in_use_path(path)]
    log = sidecars(path)[0]
    return {
        "location": str(path),
        "engine_version": SQLITE_VERSION,
        "driver": "apsw",
        "driver_version": APSW_VERSION,
        "durability": engine.durability,
        "pragmas": pragmas,
        "file_modes": {file.name: _mode(file) for file in beside if file.exists()},
        "wal_bytes": log.stat().st_size if log.exists() else 0,
    }


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.lstat().st_mode):04o}"
