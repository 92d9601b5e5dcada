"""If another process holds the database, each kind of call raises DatabaseBusyError and changes no row.

On SQLite, already BEGIN meets the lock. On PostgreSQL, the statements of the call meet the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from homeagent import Agent, AgentCreate, AgentSession, Database, IdempotencyScope, UnitOfWork
from homeagent.errors import DatabaseBusyError
from tests.conftest import (
    START,
    Children,
    FakeClock,
    add_agent,
    add_device,
    copy_template,
    dump,
    postgres_database,
    postgres_execute,
)

SCOPE = IdempotencyScope(device_id="lamp", method="door.open", key="k")
HOUR = timedelta(hours=1)
AT_ONCE = timedelta(milliseconds=10)

READS: dict[str, Callable[[UnitOfWork], object]] = {
    "one row": lambda unit: unit.devices.find_by_id("lamp"),
    "rows": lambda unit: unit.sessions.list(),
    "ORM session": lambda unit: unit.session.exec(select(Agent)).all(),
}
WRITES: dict[str, Callable[[UnitOfWork], object]] = {
    "insert": lambda unit: unit.agents.create(AgentCreate(id="new", name="N", workspace_path="/n")),
    "update": lambda unit: unit.devices.update_last_seen("lamp"),
    "delete": lambda unit: unit.agents.delete("ada", delete_sessions=True),
    "several statements": lambda unit: unit.sessions.resolve(agent_id="ada", sender_id="x"),
    "many rows": lambda unit: unit.sessions.index(
        [AgentSession(session_id="i", agent_id="ada", created_at=START, last_active_at=START)]
    ),
    "nonce": lambda unit: unit.nonces.consume("lamp", "n2", expires_at=START + HOUR),
    "key": lambda unit: unit.idempotency_keys.claim(SCOPE, fingerprint="f", lease=HOUR, ttl=HOUR),
    "cleanup": lambda unit: unit.idempotency_keys.delete_expired(),
}

# In exclusive locking mode SQLite also blocks readers: https://sqlite.org/pragma.html#pragma_locking_mode
HOLD = """
import sys
from homeagent.engine.sqlite.dialect import connect
raw = connect(sys.argv[1])
raw.execute("PRAGMA locking_mode=EXCLUSIVE")
raw.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
raw.execute("ROLLBACK")
"""


def prepare(target: str | Path) -> Database:
    """Open a database with a short busy_timeout, and create the rows that the calls name."""
    database = Database.open(target, clock=FakeClock(), busy_timeout=AT_ONCE)
    add_agent(database)
    add_device(database)
    return database


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def locked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A locked database of each engine; refused calls change no row, so all tests share the database."""
    if request.param == "sqlite":
        path = copy_template(request.getfixturevalue("sqlite_template"), tmp_path_factory.mktemp("locked") / "database")
        database = prepare(path)
        before = dump(database)
        database._engine.discard_free()
        children = Children()
        holder = children.start(HOLD, path)
        assert holder.stdout.readline() == "held\n"
        yield database
        children.finish(holder)
        children.close()
    else:
        url: str = request.getfixturevalue("postgres_url")
        # The name of the template is different in each xdist worker.
        template = request.getfixturevalue("postgres_template")
        postgres_execute(url, f"CREATE DATABASE locked_{template} TEMPLATE {template}")
        import psycopg

        where = postgres_database(url, f"locked_{template}")
        database = prepare(where)
        before = dump(database)
        with closing(psycopg.connect(where)) as other:
            tables = "devices, device_changes, agents, sessions, nonces, idempotency_keys"
            other.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())
            yield database
            other.rollback()
    assert dump(database) == before
    database.close()
    if request.param == "postgresql":
        postgres_execute(url, f"DROP DATABASE locked_{template} WITH (FORCE)")


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_locked_database(locked: Database, name: str) -> None:
    """If a call can't reach its rows, it raises DatabaseBusyError, in a write unit and in a read-only unit."""
    for read_only in (False, True) if name in READS else (False,):
        with pytest.raises(DatabaseBusyError), locked.unit_of_work(read_only=read_only) as unit:
            (READS | WRITES)[name](unit)


@pytest.mark.parametrize("read_only", [False, True])
def test_run_gives_up_on_a_locked_database(locked: Database, read_only: bool) -> None:
    """If the database stays locked, `run` tries until `busy_timeout`, and then raises DatabaseBusyError."""
    with pytest.raises(DatabaseBusyError):
        locked.run(lambda unit: unit.devices.list(), read_only=read_only)
