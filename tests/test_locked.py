"""If another process holds the database, each method of each store raises DatabaseBusyError and changes no row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent import (
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    AgentSessionUpdate,
    AgentUpdate,
    Attempt,
    Database,
    DeviceCreate,
    DeviceUpdate,
    IdempotencyScope,
    Role,
    UnitOfWork,
)
from homeagent.errors import DatabaseBusyError
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
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

Act = Callable[[UnitOfWork, Attempt], object]

ACTS: dict[str, Act] = {
    "devices.create": lambda u, a: u.devices.create(
        DeviceCreate(id="new", role=Role.NODE, shared_secret_hash="sha256$x")
    ),
    "devices.find_by_id": lambda u, a: u.devices.find_by_id("lamp"),
    "devices.find_secret_hashes": lambda u, a: u.devices.find_secret_hashes("lamp"),
    "devices.find_proof_secrets": lambda u, a: u.devices.find_proof_secrets("lamp"),
    "devices.find_proof_verifier": lambda u, a: u.devices.find_proof_verifier("lamp"),
    "devices.count_pending": lambda u, a: u.devices.count_pending(limit=1),
    "devices.require_pending_room": lambda u, a: u.devices.require_pending_room(9),
    "devices.delete_pending": lambda u, a: u.devices.delete_pending(paired_before=START),
    "devices.changes": lambda u, a: u.devices.changes(after=0),
    "devices.newest_change": lambda u, a: u.devices.newest_change(),
    "devices.delete_changes": lambda u, a: u.devices.delete_changes(before=START),
    "devices.get": lambda u, a: u.devices.get("lamp"),
    "devices.list": lambda u, a: u.devices.list(),
    "devices.update": lambda u, a: u.devices.update("lamp", DeviceUpdate(metadata={"a": 1})),
    "devices.approve": lambda u, a: u.devices.approve("lamp"),
    "devices.revoke": lambda u, a: u.devices.revoke("lamp", force=True),
    "devices.update_last_seen": lambda u, a: u.devices.update_last_seen("lamp"),
    "devices.delete": lambda u, a: u.devices.delete("lamp", force=True),
    "devices.set_secret": lambda u, a: u.devices.set_secret(
        "lamp", expected_secret_hash="sha256$of-lamp", secret_hash="sha256$y", proof_verifier=None, previous_until=None
    ),
    "devices.rehash_secret": lambda u, a: u.devices.rehash_secret(
        "lamp", expected_secret_hash="sha256$of-lamp", secret_hash="sha256$y"
    ),
    "agents.create": lambda u, a: u.agents.create(AgentCreate(id="new", name="N", workspace_path="/n")),
    "agents.find_by_id": lambda u, a: u.agents.find_by_id("ada"),
    "agents.get": lambda u, a: u.agents.get("ada"),
    "agents.list": lambda u, a: u.agents.list(),
    "agents.update": lambda u, a: u.agents.update("ada", AgentUpdate(name="A")),
    "agents.delete": lambda u, a: u.agents.delete("ada", delete_sessions=True),
    "sessions.create": lambda u, a: u.sessions.create(AgentSessionCreate(agent_id="ada")),
    "sessions.find_by_id": lambda u, a: u.sessions.find_by_id("s"),
    "sessions.get": lambda u, a: u.sessions.get("s"),
    "sessions.resolve": lambda u, a: u.sessions.resolve(agent_id="ada", sender_id="x"),
    "sessions.list": lambda u, a: u.sessions.list(),
    "sessions.touch": lambda u, a: u.sessions.touch("s", START + HOUR),
    "sessions.start": lambda u, a: u.sessions.start(agent_id="ada"),
    "sessions.move": lambda u, a: u.sessions.move("s", sender_id="y"),
    "sessions.update": lambda u, a: u.sessions.update("s", AgentSessionUpdate(metadata=1)),
    "sessions.delete": lambda u, a: u.sessions.delete("s"),
    "sessions.index": lambda u, a: u.sessions.index(
        [AgentSession(session_id="i", agent_id="ada", created_at=START, last_active_at=START)]
    ),
    "nonces.consume": lambda u, a: u.nonces.consume("lamp", "n2", expires_at=START + HOUR),
    "nonces.consume_signed": lambda u, a: u.nonces.consume_signed("lamp", "n3", signed_at=START, skew=HOUR),
    "nonces.forget": lambda u, a: u.nonces.forget("lamp"),
    "nonces.find": lambda u, a: u.nonces.find("lamp", "n"),
    "nonces.delete_expired": lambda u, a: u.nonces.delete_expired(),
    "idempotency_keys.insert": lambda u, a: u.idempotency_keys.insert(SCOPE, 1, ttl=HOUR),
    "idempotency_keys.find": lambda u, a: u.idempotency_keys.find(SCOPE),
    "idempotency_keys.find_recorded": lambda u, a: u.idempotency_keys.find_recorded(a),
    "idempotency_keys.claim": lambda u, a: u.idempotency_keys.claim(SCOPE, fingerprint="f", lease=HOUR, ttl=HOUR),
    "idempotency_keys.renew": lambda u, a: u.idempotency_keys.renew(a, lease=HOUR),
    "idempotency_keys.complete": lambda u, a: u.idempotency_keys.complete(a, 1),
    "idempotency_keys.fail": lambda u, a: u.idempotency_keys.fail(a, 1),
    "idempotency_keys.release": lambda u, a: u.idempotency_keys.release(a),
    "idempotency_keys.list_abandoned": lambda u, a: u.idempotency_keys.list_abandoned(),
    "idempotency_keys.resolve": lambda u, a: u.idempotency_keys.resolve(SCOPE, 1),
    "idempotency_keys.forget": lambda u, a: u.idempotency_keys.forget(SCOPE),
    "idempotency_keys.delete_ended": lambda u, a: u.idempotency_keys.delete_ended("lamp"),
    "idempotency_keys.delete_expired": lambda u, a: u.idempotency_keys.delete_expired(),
}

STORES = {
    "devices": DeviceStore,
    "agents": AgentStore,
    "sessions": SessionStore,
    "nonces": NonceStore,
    "idempotency_keys": IdempotencyKeyStore,
}


def test_no_method_is_missing() -> None:
    """If a store gets a new method, this test fails until the method is added to the calls of this module."""
    there = {
        f"{store}.{name}"
        for store, kind in STORES.items()
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }
    assert set(ACTS) == there


READS = frozenset(name for name in ACTS if name.partition(".")[2].startswith(("find", "get", "list", "changes")))

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


@dataclass(frozen=True)
class Locked:
    """A database with some rows, all of which another connection holds.

    Attributes:
        database: open, with a short busy_timeout.
        attempt: of a key that is in progress in the database.
    """

    database: Database
    attempt: Attempt


def prepare(target: str | Path) -> tuple[Database, Attempt]:
    """Open a database and create the rows that the calls name."""
    database = Database.open(target, clock=FakeClock(), busy_timeout=AT_ONCE)
    add_agent(database)
    add_device(database)
    with database.unit_of_work() as unit:
        unit.sessions.create(AgentSessionCreate(session_id="s", agent_id="ada"))
        unit.nonces.consume("lamp", "n", expires_at=START + HOUR)
        scope = IdempotencyScope(device_id="lamp", method="door.open", key="held")
        attempt = unit.idempotency_keys.claim(scope, fingerprint="f", lease=HOUR, ttl=HOUR)
    assert isinstance(attempt, Attempt)
    return database, attempt


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def locked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """A locked database of each engine; refused calls change no row, so all tests share the database."""
    if request.param == "sqlite":
        path = copy_template(request.getfixturevalue("sqlite_template"), tmp_path_factory.mktemp("locked") / "database")
        database, attempt = prepare(path)
        before = dump(database)
        database._engine.discard_free()
        children = Children()
        holder = children.start(HOLD, path)
        assert holder.stdout.readline() == "held\n"
        yield Locked(database, attempt)
        children.finish(holder)
        children.close()
    else:
        url: str = request.getfixturevalue("postgres_url")
        # The name of the template is different in each xdist worker.
        template = request.getfixturevalue("postgres_template")
        postgres_execute(url, f"CREATE DATABASE locked_{template} TEMPLATE {template}")
        import psycopg

        where = postgres_database(url, f"locked_{template}")
        database, attempt = prepare(where)
        before = dump(database)
        with closing(psycopg.connect(where)) as other:
            tables = "devices, device_changes, agents, sessions, nonces, idempotency_keys"
            other.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())
            yield Locked(database, attempt)
            other.rollback()
    assert dump(database) == before
    database.close()
    if request.param == "postgresql":
        postgres_execute(url, f"DROP DATABASE locked_{template} WITH (FORCE)")


def test_locked_database(locked: Locked) -> None:
    """If a method can't reach its rows, it raises DatabaseBusyError, in a write unit and in a read-only unit."""
    for name, act in ACTS.items():
        for read_only in (False, True) if name in READS else (False,):
            try:
                with locked.database.unit_of_work(read_only=read_only) as unit:
                    act(unit, locked.attempt)
            except DatabaseBusyError:
                continue
            pytest.fail(f"{name} reached its rows, in a {'read-only' if read_only else 'write'} unit")


@pytest.mark.parametrize("read_only", [False, True])
def test_run_gives_up_on_a_locked_database(locked: Locked, read_only: bool) -> None:
    """If the database stays locked, `run` tries until `busy_timeout`, and then raises DatabaseBusyError."""
    with pytest.raises(DatabaseBusyError):
        locked.database.run(lambda unit: unit.devices.list(), read_only=read_only)
