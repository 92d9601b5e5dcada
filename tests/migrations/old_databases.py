"""Databases of every release, and functions that read them."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

import homeagent
from homeagent.engine.files.database_file import create_file
from homeagent.engine.sqlite.dialect import DRIVER_NAME, connect
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.migrations import revisions
from tests import fork_server

CHECKOUT = Path(homeagent.__file__).parents[1]
FIXTURES = Path(__file__).parents[1] / "fixtures"
RECIPE: dict[str, Any] = runpy.run_path(str(FIXTURES / "make_revisions.py"))
REVISIONS: tuple[str, ...] = RECIPE["REVISIONS"]
NOW = datetime.fromtimestamp(RECIPE["NOW"] // 1000, UTC)


def few(*revisions: str, of: Sequence[str]) -> list[Any]:
    """Return parameters for these revisions, of which only the named revisions run without `-m slow`."""
    return [pytest.param(each, marks=() if each in revisions else pytest.mark.slow) for each in of]


Rows = dict[str, list[dict[str, Any]]]


def clock() -> datetime:
    """Return the time at which the fixtures' rows are read."""
    return NOW


def sqlite(path: Path) -> Any:
    """Return a bare connection, through the SQLite library that the package uses in this process."""
    return connect(str(path))


def change(path: Path, *statements: str) -> None:
    """Change a file that is not open without the package, as an administrator in a shell would."""
    with closing(sqlite(path)) as raw:
        for statement in statements:
            raw.execute(statement).fetchall()


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


# The tables of version 1 as another program would create them: no constraint has a name, and a key can be NULL.
SPECIFICATION = """
CREATE TABLE devices (id TEXT PRIMARY KEY, role TEXT NOT NULL CHECK(role IN ('client', 'node', 'admin')),
  shared_secret_hash TEXT NOT NULL, approved INTEGER NOT NULL DEFAULT 0, paired_at INTEGER NOT NULL,
  last_seen_at INTEGER, metadata TEXT);
CREATE TABLE agents (id TEXT PRIMARY KEY, name TEXT NOT NULL, workspace_path TEXT NOT NULL,
  created_at INTEGER NOT NULL, config TEXT);
CREATE TABLE sessions (session_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL REFERENCES agents(id), sender_id TEXT,
  channel_id TEXT, created_at INTEGER NOT NULL, last_active_at INTEGER NOT NULL);
CREATE INDEX idx_sessions_agent ON sessions(agent_id);
CREATE INDEX idx_sessions_sender ON sessions(sender_id);
CREATE TABLE nonces (nonce TEXT PRIMARY KEY, device_id TEXT NOT NULL, created_at INTEGER NOT NULL,
  expires_at INTEGER NOT NULL);
CREATE INDEX idx_nonces_expires ON nonces(expires_at);
CREATE TABLE idempotency_keys (key TEXT PRIMARY KEY, method TEXT NOT NULL, device_id TEXT NOT NULL,
  result TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL);
CREATE INDEX idx_idempotency_expires ON idempotency_keys(expires_at);
"""


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


def plain_engine(target: str | Path) -> Engine:
    """Return a plain SQLAlchemy engine for a PostgreSQL database or a SQLite file. On SQLite, foreign keys are off."""
    url = str(target) if "://" in str(target) else f"{DRIVER_NAME}:///{target}"
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)


_KILLED = """
import os, shutil, signal, sys
from datetime import datetime, timezone
from pathlib import Path

from sqlalchemy import Engine, event

import alembic.command, alembic.autogenerate
from homeagent import Database
from homeagent.engine.target import Target
from homeagent.maintenance.adoption import adopt, preview_adoption
from homeagent.migrations.application import Application

source, directory, step, before, action, *arguments = sys.argv[1:]
left = 10_000

def count(statement):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

# Each statement is counted as SQLite begins it (SQLITE_TRACE_STMT), BEGIN, COMMIT and pragmas included.
event.listen(Engine, "connect", lambda connection, record: connection.trace_v2(1, count))
now = datetime(2023, 11, 15, tzinfo=timezone.utc)
for number in range(0, 10_000, int(step)):
    path = Path(directory, str(number), "homeagent.db")
    path.parent.mkdir(mode=0o700)
    if source:
        shutil.copyfile(source, path)
        path.chmod(0o600)
    # A fork of a process that never opened a database: it starts in a millisecond.
    child = os.fork()
    if not child:
        try:
            exec(before)
            left = number
            exec(action)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(number, status, flush=True)
    if status != -signal.SIGKILL:
        break
"""


def killed_at_statements(
    source: Path | None, directory: Path, step: int, action: str, *arguments: object, before: str = ""
) -> list[Path]:
    """Run an action on copies of a file, in processes that are killed at different statements. Return the copies.

    Each copy has a directory, and `step` statements are between two kills; the last action runs to its end. Without a
    source no file exists before the action. The action is Python, and can use `path`, `now` and `arguments`. The SQL
    statements of `before`, which is Python too, are not counted.
    """
    done = fork_server.run(_KILLED, source or "", directory, step, before, action, *arguments, timeout=280)
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [status for _, status in ends] == [-signal.SIGKILL] * (len(ends) - 1) + [0], done.stderr
    return [directory / str(number) / "homeagent.db" for number, _ in ends]
