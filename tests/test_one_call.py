"""Stores of a `Database`: each call is a separate unit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import bindparam, event, select, text

from homeagent import AgentSession, Database, DeviceCreate, IdempotencyKey, Role, Statement, Store, errors, stores
from homeagent.stores.store import access_of
from tests.conftest import FakeClock, add_agent, in_threads

STORES = [stores.AgentStore, stores.DeviceStore, stores.IdempotencyKeyStore, stores.NonceStore, stores.SessionStore]
HASH = "sha256$" + "ab" * 32


@pytest.mark.parametrize("kind", STORES)
def test_each_method_is_declared(kind: type) -> None:
    """Each public method of a store is declared as reading or writing."""
    methods = {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    assert methods
    assert {name for name in methods if access_of(getattr(kind, name)) is None} == set()


def test_a_read_is_one_statement(sqlite_database: Database) -> None:
    """A call that reads sends its SELECT without BEGIN and COMMIT, and keeps no snapshot."""
    add_agent(sqlite_database)
    told: list[str] = []
    engine = sqlite_database._engine
    listener = lambda connection, cursor, statement, *rest: told.append(statement.split()[0])  # noqa: E731
    event.listen(engine.sa_engine, "before_cursor_execute", listener)
    engine.discard_free()  # the next connections are opened with the listener
    assert sqlite_database.agents.get("ada").id == "ada"
    assert sqlite_database.agents.list()
    assert [word for word in told if word != "PRAGMA"] == ["SELECT", "SELECT"]
    assert sqlite_database.counters().reads == 2
    add_agent(sqlite_database, "later")
    assert sqlite_database.agents.get("later").id == "later"


KEY: Any = IdempotencyKey
FIND = Statement[str](select(KEY.device_id).where(KEY.attempt == bindparam("attempt")))


class KeyStore(Store):
    def find(self, attempt: object) -> list[str]:
        return self.unit.all(FIND, attempt=attempt)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("\ud800", errors.InvalidArgumentError), (2**70, errors.InvalidArgumentError), (object(), errors.DatabaseError)],
    ids=["surrogate", "int", "type"],
)
def test_a_refused_value_blocks_no_later_read(
    database: Database, value: object, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """If a read raises an error for a value, later reads work while the error is in memory, and nothing is logged."""
    with pytest.raises(errors.HomeAgentError) as caught:
        database.store(KeyStore).find(value)
    assert type(caught.value) is kind
    assert caught.value.__context__ is None
    assert database.store(KeyStore).find(1) == []
    assert caplog.records == []


def test_nothing_to_write_takes_no_write_lock(database: Database, clock: FakeClock) -> None:
    """While a writer is busy, `resolve` of an existing route and a repeated `update_last_seen` return at once."""
    add_agent(database)
    session = database.sessions.resolve(agent_id="ada", sender_id="anna")
    database.devices.create(DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash=HASH))
    assert database.devices.update_last_seen("lamp")
    clock.advance(seconds=1)
    answers: list[object] = []

    def ask() -> None:
        answers.append(database.sessions.resolve(agent_id="ada", sender_id="anna").session_id)
        answers.append(database.devices.update_last_seen("lamp"))
        answers.append(database.devices.update_last_seen("absent"))

    with database.unit_of_work() as unit:
        unit.agents.get("ada")
        in_threads(ask)
    assert answers == [session.session_id, False, False]
    clock.advance(minutes=2)
    assert database.devices.update_last_seen("lamp")


def test_a_write_inside_a_write_unit_is_refused(database: Database, clock: FakeClock) -> None:
    """If the thread is in a write unit, a call that writes raises, and a call that reads sees committed rows."""
    with database.unit_of_work() as unit:
        unit.devices.create(DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash=HASH))
        assert database.devices.find_by_id("lamp") is None
        with pytest.raises(errors.UnitStateError):
            database.nonces.consume("lamp", "n", expires_at=clock() + timedelta(minutes=1))
    assert database.devices.find_by_id("lamp") is not None


def test_an_iterable_is_read_once(database: Database, clock: FakeClock) -> None:
    """`sessions.index` accepts a generator, as in a unit."""
    add_agent(database)

    def sessions() -> Iterator[AgentSession]:
        for number in range(300):
            yield AgentSession(session_id=f"s{number}", agent_id="ada", created_at=clock(), last_active_at=clock())

    assert database.sessions.index(sessions()) == 300
    assert len(database.sessions.list(limit=1000)) == 300


class Queue:
    """An iterable that can be read only once."""

    def __init__(self, items: list[AgentSession]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[AgentSession]:
        return self._items


@pytest.mark.parametrize("kind", [list, iter, Queue])
def test_an_index_is_repeated_after_a_conflict(database: Database, clock: FakeClock, kind: Any) -> None:
    """After a conflict with another unit, `sessions.index` of a list runs again. An iterator can't be read again."""
    add_agent(database)
    sessions = [AgentSession(session_id="s", agent_id="ada", created_at=clock(), last_active_at=clock())]
    done: list[int] = []

    def fail_once(number: int) -> None:
        done.append(number)
        if done == [1]:
            raise errors.TransientError("a conflict")

    if kind is list:
        assert database.sessions.index(sessions, progress=fail_once) == 1
        assert done == [1, 1]
    else:
        with pytest.raises(errors.TransientError):
            database.sessions.index(kind(sessions), progress=fail_once)
    assert len(database.sessions.list()) == (1 if kind is list else 0)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_only_a_stores_class_is_taken(database: Database) -> None:
    """`store` accepts only the class of a store."""
    assert isinstance(database.store(stores.NonceStore), stores.NonceStore)
    for wrong in (object, database.devices, "DeviceStore"):
        with pytest.raises(errors.InvalidArgumentError, match="store"):
            database.store(wrong)  # type: ignore[type-var]


def test_a_read_connection_has_one_snapshot_and_cannot_write(database: Database) -> None:
    """`read_connection` reads one snapshot until a commit or rollback, and refuses a write, also after COMMIT."""
    add_agent(database)
    count = text("SELECT count(*) FROM agents")
    with database.read_connection() as connection:
        assert connection.execute(count).scalar_one() == 1
        add_agent(database, "later")
        assert connection.execute(count).scalar_one() == 1
        for _ in range(2):
            with pytest.raises(errors.ReadOnlyError):
                connection.execute(text("DELETE FROM agents"))
            connection.rollback()
        assert connection.execute(count).scalar_one() == 2
        add_agent(database, "now")  # a new transaction takes no write lock either
        connection.execute(text("COMMIT"))
        with pytest.raises(errors.ReadOnlyError):
            connection.execute(text("DELETE FROM agents"))
    assert len(database.agents.list()) == 3


def test_rows_of_a_read_connection_after_its_commit(database: Database) -> None:
    """A result stays readable after `commit()` and `rollback()`."""
    for name in ("a", "b", "c"):
        add_agent(database, name)
    with database.read_connection() as connection:
        for end in (connection.commit, connection.rollback):
            found = connection.execute(text("SELECT id FROM agents ORDER BY id"))
            assert found.fetchone() == ("a",)
            end()
            assert found.fetchall() == [("b",), ("c",)]


def test_a_read_connection_attaches_nothing(sqlite_database: Database) -> None:
    """A read connection refuses ATTACH, which would allow writes and a second file."""
    with sqlite_database.read_connection() as connection, pytest.raises(errors.DatabaseError):
        connection.execute(text("ATTACH ':memory:' AS other"))


def test_two_read_connections_are_lent_at_a_time(sqlite_path: Path) -> None:
    """If two read connections are in use, a third caller waits for `busy_timeout`."""
    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=50)) as database:
        with (
            database.read_connection(),
            database.read_connection(),
            pytest.raises(errors.DatabaseBusyError, match="read connections"),
            database.read_connection(),
        ):
            pass
        with database.read_connection() as connection:
            assert connection.execute(text("SELECT 1")).scalar_one() == 1
