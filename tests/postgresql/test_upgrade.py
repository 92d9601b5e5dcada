"""Upgrades on a server that others work on. On SQLite the file's lock does what is tested here, see test_upgrades."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from homeagent import Database
from homeagent.errors import DatabaseBusyError, DatabaseError, InvalidArgumentError, MigrationError
from homeagent.migrations import REVISION, VERSION_TABLE, alembic_config, postgresql
from tests.conftest import add_agent, postgres_execute
from tests.postgresql.load import wait_for

pytestmark = pytest.mark.usefixtures("postgres_url")

SHORT = timedelta(milliseconds=300)


@contextmanager
def other(url: str) -> Iterator[Connection]:
    """Connect as another application would."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def old_url(empty_postgres_url: str) -> str:
    """The URL of a database at the revision before this version's."""
    from alembic import command

    with other(empty_postgres_url) as connection, connection.begin():
        command.upgrade(alembic_config(connection), f"{int(REVISION) - 1:04}")
    return empty_postgres_url


def revision_at(url: str) -> Any:
    """Return the revision that the database is at."""
    with other(url) as connection:
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()


def test_who_upgrades_is_waited_for_with_a_bound(old_url: str) -> None:
    """While another host holds the upgrade's lock one waits no longer than busy_timeout; then it opens."""
    with other(old_url) as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": postgresql._ADVISORY_LOCK})
        with pytest.raises(DatabaseBusyError, match=r"another host upgrades it.*busy_timeout"):
            Database.open(old_url, busy_timeout=SHORT)
        threading.Timer(0.3, connection.rollback).start()
        Database.open(old_url, busy_timeout=timedelta(seconds=30)).close()
    assert revision_at(old_url) == REVISION


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'repeatable read'",
        "default_transaction_isolation = 'serializable'",
        "statement_timeout = '100ms'",
    ],
)
def test_what_was_made_while_one_waited_is_seen(empty_postgres_url: str, setting: str) -> None:
    """Whatever a role has set: who waits for the upgrade of another host finds it made, and is not ended before."""
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
        connection.execute(text("SELECT pg_sleep(0.3)"))  # longer than a statement may take
        from alembic import command

        command.upgrade(alembic_config(connection), "head")
        connection.commit()
        thread.join(30)
    assert opened == ["opened"]


def test_search_path_that_leads_nowhere(empty_postgres_url: str) -> None:
    """Where no schema is there to make tables in, that is told with its remedy."""
    postgres_execute(empty_postgres_url, f"ALTER DATABASE {make_url(empty_postgres_url).database} SET search_path = no")
    with pytest.raises(InvalidArgumentError, match="search_path leads to no schema"):
        Database.open(empty_postgres_url)


def test_a_table_in_use_is_not_queued_for(old_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision that must wait for a table steps back again and again, so that readers and writers get their turns."""
    monkeypatch.setattr(postgresql, "_TABLE_LOCK_PATIENCE", 0.05)
    original = postgresql.upgrade
    tries: list[int] = []

    def upgrade(connection: Connection) -> None:
        tries.append(1)
        connection.execute(text("ALTER TABLE agents ADD COLUMN extra text"))
        original(connection)

    monkeypatch.setattr(postgresql, "upgrade", upgrade)
    with other(old_url) as connection:
        connection.execute(text("SELECT count(*) FROM agents"))
        with pytest.raises(DatabaseBusyError, match="a unit holds a table"):
            Database.open(old_url, busy_timeout=SHORT)
        assert len(tries) > 1
        threading.Timer(0.2, connection.rollback).start()
        with Database.open(old_url, busy_timeout=timedelta(seconds=30)) as database:
            add_agent(database)


def test_a_statement_that_takes_too_long_is_undone(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision's statement has a limit, and the error says that nothing was changed."""
    monkeypatch.setattr(postgresql, "_STATEMENT_PATIENCE", timedelta(milliseconds=100))
    monkeypatch.setattr(postgresql, "upgrade", lambda connection: connection.execute(text("SELECT pg_sleep(30)")))
    with pytest.raises(MigrationError, match="was cancelled and undone"):
        Database.open(old_url)
    assert revision_at(old_url) == f"{int(REVISION) - 1:04}"


def test_a_revision_that_fails_is_reported_with_the_table(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the upgrade says what the server missed."""
    monkeypatch.setattr(
        postgresql, "upgrade", lambda connection: connection.execute(text("ALTER TABLE nowhere ADD COLUMN x text"))
    )
    with pytest.raises(MigrationError, match='relation "nowhere" does not exist'):
        Database.open(old_url)


def test_old_code_works_through_an_upgrade(old_url: str) -> None:
    """A host that has the database open goes on while another one upgrades it."""
    with other(old_url) as connection:
        with connection.begin():
            connection.execute(text("INSERT INTO agents VALUES ('old', 'Old', '/srv/old', 0, NULL)"))
        with Database.open(old_url) as database:
            add_agent(database, "new")
        with connection.begin():
            connection.execute(text("INSERT INTO agents VALUES ('older', 'Old', '/srv/old', 0, NULL)"))
            assert connection.execute(text("SELECT count(*) FROM agents")).scalar_one() == 3
