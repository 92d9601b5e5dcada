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
from homeagent.engine.driver_errors import sqlite_error
from homeagent.engine.engine import Engine
from tests.conftest import START, add_agent, dump

SECRET = "the-bound-parameter"


def by_name(kinds: dict[type[errors.HomeAgentError], str], prefix: str = "") -> dict[str, type[errors.HomeAgentError]]:
    return {prefix + name: kind for kind, names in kinds.items() for name in names.split()}


SQLITE_FAULTS = by_name(
    {
        errors.TransientError: "BUSY BUSY_SNAPSHOT LOCKED PROTOCOL",
        errors.DiskFullError: "FULL",
        errors.ReadOnlyError: "READONLY READONLY_DIRECTORY PERM",
        errors.DatabaseMovedError: "READONLY_DBMOVED",
        errors.DatabaseIOError: "IOERR IOERR_READ IOERR_WRITE IOERR_FSYNC IOERR_SHMSIZE",
        errors.CorruptDatabaseError: "IOERR_SHORT_READ IOERR_CORRUPTFS CORRUPT CORRUPT_INDEX NOTADB",
        errors.DatabaseError: "IOERR_NOMEM CANTOPEN NOMEM INTERRUPT MISUSE",
        errors.InsecureFileError: "CANTOPEN_SYMLINK",
        errors.ConflictError: "CONSTRAINT_UNIQUE",
        errors.InvalidArgumentError: "TOOBIG",
    },
    "SQLITE_",
)
POSTGRESQL_FAULTS = by_name(
    {
        errors.TransientError: "40001 40P01 55P03 53200",
        errors.DiskFullError: "53100",
        errors.ReadOnlyError: "42501",
        errors.ConflictError: "23505",
        errors.CorruptDatabaseError: "XX001",
        errors.DatabaseError: "XX000",
    }
)

# A unit meets one SQLite error of each kind; another test compares all codes with their classes.
KINDS = [
    "BUSY", "FULL", "READONLY_DBMOVED", "IOERR_WRITE", "CORRUPT", "CANTOPEN_SYMLINK", "CONSTRAINT_UNIQUE", "TOOBIG",
]  # fmt: skip
FAULTS = [("sqlite", f"SQLITE_{name}", SQLITE_FAULTS[f"SQLITE_{name}"]) for name in KINDS] + [
    ("postgresql", name, kind) for name, kind in POSTGRESQL_FAULTS.items()
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


class FailingCursor:
    """A driver's cursor that raises at its n-th statement, and at all later statements if the failure is permanent."""

    def __init__(self, cursor: Any, plan: Plan) -> None:
        self._cursor = cursor
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, sql: str, *parameters: Any) -> Any:
        self._plan.meet(sql)
        return self._cursor.execute(sql, *parameters)

    def executemany(self, sql: str, *parameters: Any) -> Any:
        self._plan.meet(sql)
        return self._cursor.executemany(sql, *parameters)


class Plan:
    """The number of the failing statement, and the error."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.at = 0
        self.also_rollback = False
        self.seen: list[str] = []

    def meet(self, sql: str) -> None:
        """Count a statement, or fail it; a failed connection stays failed, except that ROLLBACK may still work."""
        if self.error is None:
            return
        self.seen.append(sql)
        number = len(self.seen)
        if sql == "ROLLBACK" and not self.also_rollback:
            return
        if number == self.at or (number > self.at and sql == "ROLLBACK"):
            raise self.error


@contextmanager
def failing(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """Put failing cursors into all connections that the database opens from now on."""
    plan = Plan()
    make = Engine._connection

    def link(engine: Engine, *, read_only: bool) -> StoreConnection:
        made = make(engine, read_only=read_only)
        cursor: Any = FailingCursor(made._cursor, plan)
        made._cursor, made._execute = cursor, cursor.execute
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_connection", link)
        database._engine.discard_free()
        yield plan
        plan.error = None


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


@pytest.mark.parametrize("engine_name", ["sqlite", "postgresql"], indirect=False)
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
    at = 0
    with failing(database, monkeypatch) as plan:
        plan.also_rollback = also_rollback
        while True:
            at += 1
            plan.error, plan.at, plan.seen = driver_error(database._engine, name), at, []
            fault: errors.HomeAgentError | None = None
            try:
                do(database)
            except kind as error:
                fault = error
            if fault is None:
                break
            assert SECRET not in f"{fault!r} {fault.__cause__!r} {fault.__context__!r}"
            plan.error = None
            assert dump(database) == before, f"{at}: {plan.seen}"
            add_agent(database, "next")
            with database.unit_of_work() as unit:
                assert unit.agents.delete("next")
    assert at > 8
    assert any("COMMIT" in sql for sql in plan.seen)
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("new")


def test_each_code_of_sqlite_has_its_error(sqlite_database: Database) -> None:
    """Each code of an error of SQLite becomes the error in the contract, without the message of the driver."""
    for name, kind in SQLITE_FAULTS.items():
        error = sqlite_error(driver_error(sqlite_database._engine, name))
        assert type(error) is kind, name
        assert SECRET not in f"{error!r}"


@pytest.mark.parametrize(("engine_name", "fault", "kind"), FAULTS)
def test_each_driver_error_has_its_error(
    database: Database, fault: str, kind: type[errors.HomeAgentError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a read, a write and the COMMIT, each error of the driver becomes the error in the contract."""
    before = dump(database)
    with failing(database, monkeypatch) as plan:
        plan.error, plan.at = None, 1000
        for needle in ("INSERT INTO agents", "SELECT", "COMMIT"):
            error = driver_error(database._engine, fault)

            def meet(sql: str, needle: str = needle, error: Exception = error) -> None:
                if needle in sql and "sqlite_master" not in sql:
                    raise error

            monkeypatch.setattr(plan, "meet", meet)
            with pytest.raises(kind) as refusal, database.unit_of_work() as unit:
                work(unit)
            assert type(refusal.value) is kind
            assert SECRET not in f"{refusal.value!r} {refusal.value.__cause__!r}"
            monkeypatch.setattr(plan, "meet", lambda sql: None)
            assert dump(database) == before
        in_a_block(database)
