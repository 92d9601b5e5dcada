"""Upgrades on a server with other clients. PostgreSQL only: on SQLite the file's lock protects an upgrade."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, make_url, text

from homeagent import Database
from homeagent.errors import (
    DatabaseBusyError,
    DatabaseError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
)
from homeagent.migrations import REVISION, VERSION_TABLE, postgresql, revisions
from tests.conftest import add_agent, postgres_execute
from tests.migrations.old_databases import plain_engine
from tests.postgresql.load import wait_for

pytestmark = pytest.mark.usefixtures("postgres_url")

SHORT = timedelta(milliseconds=300)


@contextmanager
def other(url: str) -> Iterator[Connection]:
    """Connect as another application would."""
    with plain_engine(url).connect() as connection:
        yield connection


@pytest.fixture
def old_url(empty_postgres_url: str) -> str:
    """The URL of a database at the previous revision."""
    with other(empty_postgres_url) as connection, connection.begin():
        revisions.upgrade(connection, f"{int(REVISION) - 1:04}")
    return empty_postgres_url


def revision_at(url: str) -> Any:
    with other(url) as connection:
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()


def test_wait_for_another_upgrade_is_bounded(old_url: str) -> None:
    """If another host holds the upgrade lock, an open waits for busy_timeout at most, then raises DatabaseBusyError."""
    with other(old_url) as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": postgresql._ADVISORY_LOCK})
        with pytest.raises(DatabaseBusyError, match=r"another host upgrades it.*busy_timeout"):
            Database.open(old_url, busy_timeout=SHORT)
        threading.Timer(0.3, connection.rollback).start()
        Database.open(old_url, busy_timeout=timedelta(seconds=30)).close()
    assert revision_at(old_url) == REVISION


SETTINGS = [f"default_transaction_isolation = '{level}'" for level in ("repeatable read", "serializable")]


@pytest.mark.parametrize("setting", [*SETTINGS, "statement_timeout = '100ms'"])
def test_upgrade_by_another_host_is_seen(empty_postgres_url: str, setting: str) -> None:
    """For any settings of a role, an open that waited for another host's upgrade sees it and works."""
    postgres_execute(empty_postgres_url, f"ALTER DATABASE {make_url(empty_postgres_url).database} SET {setting}")
    opened: list[str] = []

    def use() -> None:
        try:
            Database.open(empty_postgres_url).close()
            opened.append("opened")
        except DatabaseError as error:
            opened.append(str(error))

    with other(empty_postgres_url) as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": postgresql._ADVISORY_LOCK})
        thread = threading.Thread(target=use)
        thread.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        wait_for("another host", lambda: opened or connection.execute(waiting).scalar_one())
        connection.execute(text("SELECT pg_sleep(0.3)"))  # longer than statement_timeout
        revisions.upgrade(connection)
        connection.commit()
        thread.join(30)
    assert opened == ["opened"]


def test_search_path_without_a_schema(empty_postgres_url: str) -> None:
    """If search_path names no existing schema, the error says so with the remedy."""
    postgres_execute(empty_postgres_url, f"ALTER DATABASE {make_url(empty_postgres_url).database} SET search_path = no")
    with pytest.raises(InvalidArgumentError, match="search_path leads to no schema"):
        Database.open(empty_postgres_url)


def test_foreign_table_is_named(empty_postgres_url: str) -> None:
    """If the schema holds another application's table, the error names the table."""
    postgres_execute(empty_postgres_url, "CREATE TABLE devices (id integer)")
    with pytest.raises(ForeignDatabaseError, match=r"names of homeagent's tables \(devices\)"):
        Database.open(empty_postgres_url)


def test_table_in_use_is_retried(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a table is in use, the upgrade releases its lock request and tries again, so that other units proceed."""
    monkeypatch.setattr(postgresql, "_TABLE_LOCK_PATIENCE", 0.05)
    original = postgresql.upgrade
    tries: list[int] = []

    def upgrade(connection: Connection) -> None:
        tries.append(1)
        if len(tries) == last:
            holder.rollback()
        connection.execute(text("ALTER TABLE agents ADD COLUMN extra text"))
        original(connection)

    monkeypatch.setattr(postgresql, "upgrade", upgrade)
    with other(old_url) as holder:
        holder.execute(text("SELECT count(*) FROM agents"))
        last = 0
        with pytest.raises(DatabaseBusyError, match="a unit holds a table"):
            Database.open(old_url, busy_timeout=SHORT)
        tries.clear()
        last = 2
        with Database.open(old_url, busy_timeout=timedelta(seconds=30)) as database:
            add_agent(database)
    assert len(tries) >= 2


FAILING: dict[str, str] = {
    "was cancelled and undone": "SELECT pg_sleep(30)",
    'relation "nowhere" does not exist': "ALTER TABLE nowhere ADD COLUMN x text",
}


@pytest.mark.parametrize("problem", FAILING)
def test_failing_statement_is_undone(old_url: str, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    """If a statement of a revision exceeds its limit or fails, the upgrade is undone, and the error says why."""
    monkeypatch.setattr(postgresql, "_STATEMENT_PATIENCE", timedelta(milliseconds=100))
    monkeypatch.setattr(postgresql, "upgrade", lambda connection: connection.execute(text(FAILING[problem])))
    with pytest.raises(MigrationError, match=problem):
        Database.open(old_url)
    assert revision_at(old_url) == f"{int(REVISION) - 1:04}"


def test_old_code_works_through_an_upgrade(old_url: str) -> None:
    """If one host upgrades the database, another host with the database open continues to work."""
    with other(old_url) as connection:
        with connection.begin():
            connection.execute(text("INSERT INTO agents VALUES ('old', 'Old', '/srv/old', 0, NULL)"))
        with Database.open(old_url) as database:
            add_agent(database, "new")
        with connection.begin():
            connection.execute(text("INSERT INTO agents VALUES ('older', 'Old', '/srv/old', 0, NULL)"))
            assert connection.execute(text("SELECT count(*) FROM agents")).scalar_one() == 3
