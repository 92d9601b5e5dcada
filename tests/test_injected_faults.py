"""If a statement of a unit fails with any kind of driver error, the unit is rolled back whole, and work continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import apsw
import pytest

from homeagent import AgentCreate, AgentSessionCreate, Database, UnitOfWork, errors
from homeagent.engine.connection import StoreConnection
from homeagent.engine.engine import Engine
from tests.conftest import START, add_agent, dump

SECRET = "the-bound-parameter"


# A unit meets one SQLite error of each kind; tests/engine/sqlite/test_dialect.py compares all codes with their classes.
FAULTS = [
    ("sqlite", "SQLITE_BUSY", errors.TransientError),
    ("sqlite", "SQLITE_FULL", errors.DiskFullError),
    ("sqlite", "SQLITE_READONLY_DBMOVED", errors.DatabaseMovedError),
    ("sqlite", "SQLITE_IOERR_WRITE", errors.DatabaseIOError),
    ("sqlite", "SQLITE_CORRUPT", errors.CorruptDatabaseError),
    ("sqlite", "SQLITE_CANTOPEN_SYMLINK", errors.InsecureFileError),
    ("sqlite", "SQLITE_CONSTRAINT_UNIQUE", errors.ConflictError),
    ("sqlite", "SQLITE_TOOBIG", errors.InvalidArgumentError),
    *(("postgresql", code, errors.TransientError) for code in ("40001", "40P01", "55P03", "53200")),
    ("postgresql", "53100", errors.DiskFullError),
    ("postgresql", "42501", errors.ReadOnlyError),
    *(("postgresql", code, errors.ConflictError) for code in ("23505", "44000")),
    ("postgresql", "58030", errors.DatabaseIOError),
    ("postgresql", "XX001", errors.CorruptDatabaseError),
    ("postgresql", "XX000", errors.DatabaseError),
]


def driver_error(engine: Engine, name: str) -> Exception:
    """Return an exception as the driver raises it, with a value in its message that no error of homeagent may show."""
    error: Any
    if engine.dialect_name == "sqlite":
        error = apsw.SQLError(f"it failed with {SECRET}")
        error.extendedresult = getattr(apsw, name)
    else:
        import psycopg

        error = psycopg.OperationalError(f"it failed with {SECRET}")
        error.sqlstate = name
    assert isinstance(error, Exception)
    return error


@contextmanager
def meeting(database: Database, monkeypatch: pytest.MonkeyPatch, meet: Callable[[str], None]) -> Iterator[None]:
    """Call a function before each statement of all connections that the database opens from now on."""
    make = Engine._connection

    class MeetingCursor:
        def __init__(self, cursor: Any) -> None:
            self._cursor = cursor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cursor, name)

        def execute(self, sql: str, *parameters: Any) -> Any:
            meet(sql)
            return self._cursor.execute(sql, *parameters)

        def executemany(self, sql: str, *parameters: Any) -> Any:
            meet(sql)
            return self._cursor.executemany(sql, *parameters)

    def connect(engine: Engine, *, read_only: bool) -> StoreConnection:
        made = make(engine, read_only=read_only)
        made._cursor = MeetingCursor(made._cursor)
        made._execute = made._cursor.execute
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_connection", connect)
        database._engine.discard_free()
        yield


def work(unit: UnitOfWork) -> None:
    """Write to four tables, with a savepoint."""
    unit.agents.create(AgentCreate(id="new", name="N", workspace_path="/n"))
    with unit.savepoint():
        unit.sessions.create(AgentSessionCreate(session_id="s", agent_id="new"))
    unit.nonces.consume("lamp", "n", expires_at=START + timedelta(hours=1))
    unit.agents.find_by_id("before")


def in_a_block(database: Database) -> None:
    with database.unit_of_work() as unit:
        work(unit)


def as_a_function(database: Database) -> None:
    database.run(work)


@pytest.mark.parametrize("also_rollback", [False, True], ids=["", "rollback fails too"])
@pytest.mark.parametrize("do", [in_a_block, as_a_function])
def test_each_statement_fails_once(
    database: Database,
    engine_name: str,
    do: Callable[[Database], None],
    also_rollback: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If any statement of a unit fails, BEGIN and COMMIT included, no row is stored, and the next unit works."""
    add_agent(database, "before")
    before = dump(database)
    name, kind = "XX000", errors.DatabaseError
    if engine_name == "sqlite":
        name, kind = "SQLITE_IOERR_WRITE", errors.DatabaseIOError
    error: Exception | None = None
    seen: list[str] = []
    at = 0

    def meet(sql: str) -> None:
        """Fail the statement with this number. After a failure, ROLLBACK fails too if the test says so."""
        seen.append(sql)
        fails = len(seen) == at or (len(seen) > at and sql == "ROLLBACK")
        if error is not None and fails and (also_rollback or sql != "ROLLBACK"):
            raise error

    with meeting(database, monkeypatch, meet):
        while True:
            at += 1
            error = driver_error(database._engine, name)
            seen.clear()
            fault: errors.HomeAgentError | None = None
            try:
                do(database)
            except kind as raised:
                fault = raised
            error = None
            if fault is None:
                break
            assert SECRET not in f"{fault!r} {fault.__cause__!r} {fault.__context__!r}"
            assert dump(database) == before, f"{at}: {seen}"
            add_agent(database, "next")
            with database.unit_of_work() as unit:
                assert unit.agents.delete("next")
    assert at > 8
    assert any("COMMIT" in sql for sql in seen)
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("new")


@pytest.mark.parametrize(("engine_name", "fault", "kind"), FAULTS)
def test_each_driver_error_has_its_error(
    database: Database, fault: str, kind: type[errors.HomeAgentError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a read, a write and the COMMIT, each error of the driver becomes the error in the contract."""
    before = dump(database)
    needle: str | None = None

    def meet(sql: str) -> None:
        if needle is not None and needle in sql and "sqlite_master" not in sql:
            raise driver_error(database._engine, fault)

    with meeting(database, monkeypatch, meet):
        for needle in ("INSERT INTO agents", "SELECT", "COMMIT"):
            with pytest.raises(kind) as refusal:
                in_a_block(database)
            assert type(refusal.value) is kind
            assert SECRET not in f"{refusal.value!r} {refusal.value.__cause__!r}"
            needle = None  # the statements of `dump()` must not fail
            assert dump(database) == before
        in_a_block(database)
