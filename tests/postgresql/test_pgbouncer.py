"""pgbouncer in transaction mode: each transaction may get another session. PostgreSQL only: SQLite has no pooler."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text

from homeagent import AgentCreate, Database, Freshness, IdempotencyScope, ReplayGuard, diagnose
from homeagent.models.types import to_milliseconds
from tests.conftest import START, FakeClock, add_device, postgres_execute
from tests.postgresql.server import Installation, free_port
from tests.postgresql.test_connections import end_sessions
from tests.postgresql.test_search_path import WAYS, shadow

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")

pytestmark = [
    pytest.mark.usefixtures("postgres_url"),
    pytest.mark.skipif(
        PROGRAM is None, reason="pgbouncer is not installed: Debian and Homebrew have it under this name"
    ),
]

SESSIONS = 2
MINUTE = timedelta(minutes=1)


@pytest.fixture
def pooled_url(empty_postgres_url: str, installation: Installation, public_directory: Path) -> Iterator[str]:
    """The URL of a new database without tables, through a pooler with two sessions."""
    assert PROGRAM is not None
    server = make_url(empty_postgres_url)
    directory, port = public_directory, free_port()
    host = server.host or server.query["host"]
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={host} port={server.port or 5432} user={server.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = transaction\ndefault_pool_size = {SESSIONS}\nmin_pool_size = {SESSIONS}\n"
        # End a long wait for one of the two sessions with an error; otherwise the tests would hang.
        "query_wait_timeout = 20\n"
    )
    if installation.user is not None:
        # pgbouncer refuses to run as root, as the server does.
        for path in (directory, directory / "pgbouncer.ini"):
            shutil.chown(path, installation.user)
    with (directory / "log").open("w") as log:
        process = installation.start(PROGRAM, directory / "pgbouncer.ini", directory=directory, out=log)
    try:
        for _ in range(400):
            if "process up" in (said := (directory / "log").read_text()):
                break
            assert process.poll() is None, said
            time.sleep(0.01)
        yield f"postgresql://postgres@127.0.0.1:{port}/{server.database}"
    finally:
        process.kill()
        process.wait()


def in_sessions(url: str, statement: str) -> set[Any]:
    """Run a statement in each session of the pooler, and return the rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        done = [connection.execute(statement.encode()) for _ in range(2 * SESSIONS)]
        return {cursor.fetchone() for cursor in done if cursor.description is not None}


def test_store_works_behind_a_pooler(pooled_url: str, empty_postgres_url: str, clock: FakeClock) -> None:
    """If eight threads share two sessions, the store works without session settings and changes none."""
    with Database.open(pooled_url, clock=clock, busy_timeout=timedelta(seconds=20)) as database:

        def use(name: str) -> None:
            # Often enough that psycopg would prepare a statement.
            for number in range(10):
                key = IdempotencyScope(name, "on", f"k{number}")
                with database.unit_of_work() as unit:
                    unit.agents.create(AgentCreate(id=f"{name}{number}", name="A", workspace_path="/srv"))
                    assert unit.agents.get(f"{name}{number}").name == "A"
                    assert unit.session.connection().execute(text("SHOW lock_timeout")).scalar() == "20s"
                is_new = database.run(lambda unit: unit.nonces.consume(name, "n", expires_at=START + MINUTE))
                assert is_new is (number == 0)
                assert database.run_once(key, lambda attempt: attempt.number).value == 1
                assert len(database.run(lambda unit: unit.agents.list(limit=1000), read_only=True)) > number

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(use, [f"t{number}-" for number in range(8)])) == [None] * 8
        assert database.status().rows["agents"] == 80

        assert in_sessions(
            pooled_url, "SELECT current_setting('lock_timeout'), count(*) FROM pg_prepared_statements"
        ) == {("0", 0)}
        # The pooler's sessions end, and pgbouncer reports the loss to the next clients.
        end_sessions(empty_postgres_url)
        for _ in range(4):
            assert len(database.run(lambda unit: unit.agents.list(limit=1000))) == 80


def test_epoch_is_read_with_each_message(pooled_url: str, empty_postgres_url: str, clock: FakeClock) -> None:
    """If a connection to the pooler outlives an epoch, the gateway obeys the new epoch with the next message."""
    guard = ReplayGuard()

    def judge(nonce: str) -> Freshness:
        return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START))

    with Database.open(pooled_url, clock=clock, busy_timeout=timedelta(seconds=20)) as database:
        assert judge("one") is Freshness.FRESH
        postgres_execute(empty_postgres_url, f"UPDATE store SET epoch = 2, restored_at = {to_milliseconds(START)}")
        assert judge("two") is Freshness.STALE


def test_each_transaction_sets_the_schema(pooled_url: str, empty_postgres_url: str) -> None:
    """Neither a schema that is created later nor another client's setting changes the schema of a transaction."""
    Database.open(empty_postgres_url).close()
    in_sessions(pooled_url, "SET search_path = pg_temp")
    with Database.open(pooled_url, migrate=False) as database:
        add_device(database, "lamp")
        shadow(empty_postgres_url)
        for name, ids in WAYS.items():
            assert ids(database) == ["lamp"], name


def test_statements_are_prepared_only_without_a_pooler(pooled_url: str, empty_postgres_url: str) -> None:
    """On a direct connection, a frequent statement is prepared, which halves the server's costs."""
    for url, expected in ((pooled_url, False), (empty_postgres_url, True)):
        with Database.open(url) as database, database.unit_of_work() as unit:
            for _ in range(10):
                unit.agents.find_by_id("ada")
            count = unit.session.connection().execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
            assert (count > 0) is expected


def test_doctor_leaves_no_setting(pooled_url: str) -> None:
    """If the doctor used a session, the session's statement limit does not apply to later clients."""
    Database.open(pooled_url).close()
    assert diagnose(pooled_url).finding("clock") is not None
    assert in_sessions(pooled_url, "SELECT current_setting('statement_timeout')") == {("0",)}


def test_device_changes_arrive_behind_a_pooler(pooled_url: str, empty_postgres_url: str) -> None:
    """An iterator behind a pooler, which forwards no notification, gets the changes of another host."""

    async def watch(database: Database, other: Database) -> list[str | None]:
        changes = database.watch_devices()
        add_device(other, "lamp")
        async with asyncio.timeout(20):
            first = await anext(changes)
            add_device(other, "phone")
            return [first.device_id, (await anext(changes)).device_id]

    with Database.open(pooled_url) as database, Database.open(empty_postgres_url) as other:
        assert asyncio.run(watch(database, other)) == ["lamp", "phone"]
