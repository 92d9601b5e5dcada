"""Databases of every release, and functions that read them."""

from __future__ import annotations

import json
import runpy
import shutil
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.pool import NullPool

import homeagent
from homeagent.engine.files.database_file import create_file
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.migrations import revisions

CHECKOUT = Path(homeagent.__file__).parents[1]
FIXTURES = Path(__file__).parents[1] / "fixtures"
RECIPE: dict[str, Any] = runpy.run_path(str(FIXTURES / "make_revisions.py"))
REVISIONS: tuple[str, ...] = RECIPE["REVISIONS"]
NOW = datetime.fromtimestamp(RECIPE["NOW"] // 1000, UTC)

Rows = dict[str, list[dict[str, Any]]]


def clock() -> datetime:
    """Return the time at which the fixtures' rows are read."""
    return NOW


def sqlite(path: Path) -> Any:
    """Return a bare connection, through the SQLite library that the package uses in this process."""
    return connect(str(path))


def fetch(path: Path, query: str) -> list[Any]:
    """Return the rows of a query on a file that is not open."""
    with closing(sqlite(path)) as raw:
        return list(raw.execute(query).fetchall())


def old_database(directory: Path, revision: str) -> Path:
    """Return a private copy of the database of this revision."""
    path = directory / "homeagent.db"
    shutil.copyfile(FIXTURES / "revisions" / f"{revision}.db", path)
    path.chmod(0o600)
    return path


def upgrade(path: Path, revision: str) -> None:
    """Create a file, or take an existing one, and run the real upgrade to a revision."""
    create_file(path)
    engine = SQLiteEngine(path, busy_timeout=timedelta(0), durability="normal")
    engine.prepare_header()
    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            revisions.upgrade(connection, revision)
    engine.close()


def rows_of(path: Path) -> Rows:
    """Return every row of every table, in a fixed order, without NULL columns."""
    with closing(sqlite(path)) as raw:
        tables = [row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        found: Rows = {}
        for table in tables:
            cursor = raw.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in cursor.description]
            found[table] = sorted(
                ({n: v for n, v in zip(names, row, strict=True) if v is not None} for row in cursor.fetchall()),
                key=lambda row: json.dumps(row, sort_keys=True, default=repr),
            )
    return found


def is_sound(path: Path) -> bool:
    """Return whether SQLite finds neither damage nor a broken reference."""
    with closing(sqlite(path)) as raw:
        damage = raw.execute("PRAGMA integrity_check").fetchall()
        return damage == [("ok",)] and not raw.execute("PRAGMA foreign_key_check").fetchall()


def server(url: str) -> Engine:
    """Return a plain SQLAlchemy engine for a PostgreSQL database."""
    return create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
