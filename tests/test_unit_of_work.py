"""Units of work: a single transaction, whatever happens in the unit."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import event, text
from sqlmodel import select

from homeagent import (
    Agent,
    AgentSession,
    AgentSessionCreate,
    AgentUpdate,
    Database,
    Device,
    IdempotencyScope,
    Statement,
    Store,
    Table,
    UnitOfWork,
    errors,
)
from tests.batches import Odd, agents_of, create, creating, run_together
from tests.conftest import START, MakeDatabase, add_agent, add_device, dump, in_threads
from tests.interrupts import interrupt_at


def orm_agent(agent_id: str) -> Agent:
    return Agent(id=agent_id, name="Ada", workspace_path="/srv", created_at=START)


def test_unit_leaves_no_reference_cycle(database: Database) -> None:
    """When the block ends, Python frees the unit and its stores without the garbage collector."""
    add_agent(database)
    gc.freeze()  # so that the collection reads only the objects of this test
    gc.disable()
    try:
        for read_only in (False, True):
            with database.unit_of_work(read_only=read_only) as unit:
                unit.agents.get("ada")
        del unit
        # Threads of earlier tests can leave other objects, so look only for units and stores.
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [each for each in gc.garbage if isinstance(each, (UnitOfWork, Store))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()


def test_closed_database_is_freed(target: str) -> None:
    """SQLAlchemy's caches of compiled statements do not keep a closed database in memory."""
    database = Database.open(target)
    with database.unit_of_work() as unit:
        unit.session.add(orm_agent("ada"))
    engine = weakref.ref(database._engine)
    database.close()
    del database, unit
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Odd])
def test_any_exception_rolls_back(database: Database, kind: type[BaseException]) -> None:
    """If an exception leaves the block, the unit is rolled back, the exception passes, and the next unit works."""
    with pytest.raises(kind), database.unit_of_work() as unit:
        create(unit, "ada")
        unit.session.add(orm_agent("orm"))
        unit.session.flush()
        raise kind
    assert agents_of(database) == []
    add_agent(database)
    assert agents_of(database) == ["ada"]


@pytest.mark.parametrize("nested", [False, True], ids=["block", "savepoint"])
@pytest.mark.parametrize("by_session", [False, True], ids=["unit", "session"])
def test_rollback_abandons_the_unit(database: Database, by_session: bool, nested: bool) -> None:
    """After rollback() the unit refuses all calls but rollback(), commits no row, and frees the write lock."""
    called: list[str] = []
    with database.unit_of_work() as unit, unit.savepoint() if nested else nullcontext():
        create(unit, "ada")
        unit.after_commit(lambda: called.append("never"))
        (unit.session if by_session else unit).rollback()
        unit.rollback()
        for act in (lambda: unit.session, lambda: unit.agents.list(), lambda: create(unit, "bob")):
            with pytest.raises(errors.UnitStateError, match="rolled back"):
                act()
    assert (agents_of(database), called) == ([], [])
    add_agent(database)


@pytest.mark.parametrize("prepare", ["store", "session"])
@pytest.mark.parametrize("inside", ["store", "session"])
@pytest.mark.parametrize("by_session", [False, True], ids=["savepoint", "begin_nested"])
def test_savepoint_undoes_only_its_block(database: Database, prepare: str, inside: str, by_session: bool) -> None:
    """If a savepoint's block raises, its writes by store and ORM are undone, whenever the session was opened."""

    def savepoint(unit: UnitOfWork) -> AbstractContextManager[Any]:
        return unit.session.begin_nested() if by_session else unit.savepoint()

    def add(unit: UnitOfWork, way: str, agent_id: str) -> None:
        if way == "session":
            unit.session.add(orm_agent(f"{agent_id} orm"))
        create(unit, agent_id)

    with database.unit_of_work() as unit:
        add(unit, prepare, "before")
        with pytest.raises(ValueError, match="inner"), savepoint(unit):
            add(unit, inside, "inner")
            raise ValueError("inner")
        assert unit.agents.find_by_id("inner") is None
        with savepoint(unit):
            add(unit, inside, "kept")
        create(unit, "after")
    kept = ["after", "before", "kept"]
    kept += [f"{name} orm" for name, way in (("before", prepare), ("kept", inside)) if way == "session"]
    assert agents_of(database) == sorted(kept)


@pytest.mark.parametrize("orm", [False, True])
def test_savepoints_nest(database: Database, orm: bool) -> None:
    """If an outer savepoint is undone, its kept inner savepoints are too; an undone inner savepoint keeps the outer."""
    with database.unit_of_work() as unit:
        if orm:
            assert unit.session.exec(select(Agent)).all() == []
        with suppress(ValueError), unit.savepoint():
            create(unit, "outer")
            with unit.savepoint():
                create(unit, "inner")
            raise ValueError
        with unit.savepoint():
            create(unit, "outer 2")
            with suppress(ValueError), unit.savepoint():
                create(unit, "inner 2")
                raise ValueError
    assert agents_of(database) == ["outer 2"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("orm", [False, True])
def test_savepoints_end_in_order(database: Database, orm: bool, fails: bool) -> None:
    """If an outer savepoint ends before an inner savepoint, the inner savepoint raises, and the unit is undone."""
    with pytest.raises(errors.UnitStateError, match="inner savepoint first"), database.unit_of_work() as unit:
        if orm:
            unit.session.connection()
        outer, inner = unit.savepoint(), unit.savepoint()
        outer.__enter__()
        inner.__enter__()
        create(unit, "ada")
        outer.__exit__(None, None, None)
        inner.__exit__(ValueError if fails else None, ValueError() if fails else None, None)
    assert agents_of(database) == []


@pytest.mark.parametrize("flushed", [False, True], ids=["statement", "flush"])
def test_savepoint_survives_a_constraint(database: Database, flushed: bool) -> None:
    """If a statement or flush in a savepoint is refused, only this savepoint is undone on both engines."""
    add_agent(database)

    def refuse(unit: UnitOfWork) -> None:
        if flushed:
            unit.session.add(orm_agent("ada"))
        else:
            unit.session.connection().execute(
                text("INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('ada', 'x', '/x', 0)")
            )

    with database.unit_of_work() as unit:
        create(unit, "before")
        with pytest.raises(errors.ConflictError), unit.savepoint():
            create(unit, "outer")
            with pytest.raises(errors.ConflictError), unit.savepoint():
                create(unit, "inner")
                refuse(unit)
            assert [agent.id for agent in unit.agents.list()] == ["ada", "before", "outer"]
            refuse(unit)
        create(unit, "bob")
    assert agents_of(database) == ["ada", "before", "bob"]


@pytest.fixture
def refusing(sqlite_database: Database) -> Database:
    """A database in which SQLite rolls back the whole transaction of the agent "bob"."""
    statement = (
        "CREATE TRIGGER own_refusal BEFORE INSERT ON agents WHEN NEW.id = 'bob' BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
    )
    with sqlite_database.unit_of_work() as unit:
        unit.session.connection().execute(text(statement))
    return sqlite_database


@pytest.mark.parametrize("orm", [False, True])
@pytest.mark.parametrize("catches", ["at the end", "before a statement", "before a flush", "a flush in a savepoint"])
def test_a_unit_that_sqlite_has_rolled_back(refusing: Database, orm: bool, catches: str) -> None:
    """If a caller catches the error of a whole rollback, the unit stores no later change and does not commit."""

    def work(unit: UnitOfWork) -> None:
        if orm:
            unit.session.exec(select(Agent)).all()
        create(unit, "before")
        with pytest.raises(errors.ConflictError):
            if catches == "a flush in a savepoint":
                with unit.savepoint():
                    unit.session.add(Agent(id="bob", name="B", workspace_path="/", created_at=START))
            else:
                create(unit, "bob")
        if catches == "before a statement":
            create(unit, "after")
        elif catches == "before a flush":
            unit.session.add(Agent(id="after", name="A", workspace_path="/", created_at=START))

    def block() -> None:
        with refusing.unit_of_work() as unit:
            work(unit)

    for run in (block, lambda: refusing.run(work)):
        with pytest.raises(errors.UnitStateError, match="transaction of this unit of work has ended early"):
            run()
        assert agents_of(refusing) == []
    outcomes = run_together(refusing, [creating("one"), work, creating("two")])
    assert list(map(type, outcomes)) == [str, errors.UnitStateError, str]
    assert agents_of(refusing) == ["one", "two"]


ENDS: dict[str, Callable[[UnitOfWork], object]] = {
    "rollback of the connection": lambda unit: unit.session.connection().rollback(),
    "commit of the connection": lambda unit: unit.session.connection().commit(),
} | {
    f"{sql} {way}": lambda unit, run=run, sql=sql: run(unit, sql)
    for sql in ("ROLLBACK", "COMMIT")
    for way, run in {
        "by the session": lambda unit, sql: unit.session.execute(text(sql)),
        "by a store": lambda unit, sql: unit.write(Statement[None](text(sql))),
    }.items()
}


@pytest.mark.parametrize("later", ["nothing", "store", "session"])
@pytest.mark.parametrize("end", ENDS)
def test_a_unit_whose_transaction_was_ended_by_sql(database: Database, end: str, later: str) -> None:
    """If SQL or SQLAlchemy's connection ends the transaction, the unit raises an error and stores no later change. The
    connection's method commit() stores no row.
    """

    def work(unit: UnitOfWork) -> None:
        create(unit, "before")
        with suppress(errors.UnitStateError):
            ENDS[end](unit)
        if later == "store":
            create(unit, "after")
        elif later == "session":
            unit.session.add(orm_agent("after"))

    with pytest.raises(errors.UnitStateError, match="transaction"):
        database.run(work)
    assert agents_of(database) == (["before"] if "COMMIT" in end else [])


def test_a_unit_whose_connection_was_closed(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """If the connection of `uow.session` is closed, the unit raises UnitStateError and stores nothing."""

    def close(unit: UnitOfWork) -> None:
        create(unit, "closed")
        with unit.session.connection() as connection:
            connection.execute(text("SELECT 1"))

    def write(unit: UnitOfWork) -> None:
        close(unit)
        create(unit, "after")

    def write_in_a_savepoint(unit: UnitOfWork) -> None:
        with unit.savepoint():
            write(unit)

    def close_in_a_savepoint(unit: UnitOfWork) -> None:
        with unit.savepoint():
            close(unit)

    def roll_back(unit: UnitOfWork) -> None:
        close(unit)
        unit.rollback()

    for work in (close, write, write_in_a_savepoint, close_in_a_savepoint):
        with pytest.raises(errors.UnitStateError, match="transaction"):
            database.run(work)
    with pytest.raises(errors.UnitStateError, match="transaction"):
        database.run(lambda unit: unit.session.connection().close(), read_only=True)
    database.run(roll_back)
    assert agents_of(database) == []
    assert caplog.records == []


@pytest.mark.parametrize("orm", [False, True])
def test_savepoint_keeps_the_error_of_a_whole_rollback(refusing: Database, orm: bool) -> None:
    """If SQLite rolls back the whole unit inside a savepoint, the caller gets the error that caused the rollback."""
    with pytest.raises(errors.ConflictError), refusing.unit_of_work() as unit:
        if orm:
            assert unit.session.exec(select(Agent)).all() == []
        with unit.savepoint():
            create(unit, "bob")


def test_after_commit_runs_once_in_order(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Callbacks run in order after other connections see the commit, and may open units; an error is only logged."""
    seen: list[object] = []

    def first() -> None:
        seen.append(agents_of(database))
        add_agent(database, "made by a callback")

    def fail() -> None:
        raise RuntimeError("callback broke")

    with database.unit_of_work() as unit:
        for callback in (first, fail, lambda: seen.append(2)):
            unit.after_commit(callback)
        create(unit, "ada")
        assert seen == []
    assert seen == [["ada"], 2]
    add_agent(database, "bob")
    assert seen == [["ada"], 2]
    assert agents_of(database) == ["ada", "bob", "made by a callback"]
    assert "after_commit" in caplog.text
    assert "callback broke" in caplog.text


@pytest.mark.parametrize("kind", ["savepoint", "begin_nested", "rollback of begin_nested", "refused flush"])
def test_after_commit_never_runs_after_a_rollback(database: Database, kind: str) -> None:
    """If a unit or a savepoint is undone, its callbacks never run. Callbacks from before the savepoint run."""
    add_agent(database)
    seen: list[str] = []
    with suppress(ValueError), database.unit_of_work() as unit:
        unit.after_commit(lambda: seen.append("unit"))
        raise ValueError
    with database.unit_of_work() as unit:
        unit.after_commit(lambda: seen.append("kept"))
        if kind == "rollback of begin_nested":
            nested = unit.session.begin_nested()
            unit.after_commit(lambda: seen.append("savepoint"))
            nested.rollback()
        else:
            block = unit.savepoint() if kind == "savepoint" else unit.session.begin_nested()
            with suppress(ValueError, errors.ConflictError), block:
                with unit.session.begin_nested():
                    unit.after_commit(lambda: seen.append("inner savepoint"))
                unit.after_commit(lambda: seen.append("savepoint"))
                if kind == "refused flush":
                    unit.session.add(orm_agent("ada"))
                    unit.session.flush()
                raise ValueError
        with unit.session.begin_nested():
            unit.after_commit(lambda: seen.append("kept too"))
    assert seen == ["kept", "kept too"]


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_callback_that_is_not_a_function(database: Database) -> None:
    """If a callback is not callable or needs awaiting, `after_commit` refuses it before the commit."""

    async def callback() -> None:
        """Return without an effect."""

    with database.unit_of_work() as unit:
        for bad in (callback, None):
            with pytest.raises(errors.InvalidArgumentError, match="callback"):
                unit.after_commit(bad)  # type: ignore[arg-type]  # on purpose


def test_read_only_unit_is_one_snapshot(database: Database, reopen: MakeDatabase) -> None:
    """Commits of other connections during a read-only unit are visible neither to its stores nor to its ORM session."""
    add_agent(database)
    other = reopen()
    with database.unit_of_work(read_only=True) as unit:
        add_agent(other, "bob")
        add_agent(database, "eve")
        assert [agent.id for agent in unit.agents.list()] == ["ada"]
        add_agent(other, "zoe")
        assert [agent.id for agent in unit.session.exec(select(Agent)).all()] == ["ada"]
    assert agents_of(database) == ["ada", "bob", "eve", "zoe"]


@pytest.mark.parametrize("undone", [False, True], ids=["committed", "rolled back"])
def test_a_partly_read_result_keeps_no_snapshot(database: Database, reopen: MakeDatabase, undone: bool) -> None:
    """If the ORM session reads a result in part, the snapshot ends with the unit, and the next units can write."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    kept = []
    for read_only in (True, False):
        with suppress(LookupError), database.unit_of_work(read_only=read_only) as unit:
            result = unit.session.connection().execute(text("SELECT id FROM agents ORDER BY id"))
            assert result.fetchone() == ("ada",)
            kept.append(result)
            if undone:
                raise LookupError
    add_agent(reopen(busy_timeout=timedelta(0)), "eve")
    assert agents_of(database) == ["ada", "bob", "eve"]
    add_agent(database, "zoe")
    assert agents_of(database) == ["ada", "bob", "eve", "zoe"]


READ_ONLY: dict[str, Callable[[UnitOfWork], object]] = {
    "start": lambda unit: unit.sessions.start(agent_id="ada"),
    "resolve": lambda unit: unit.sessions.resolve(agent_id="ada", sender_id="new"),
    "create": lambda unit: unit.sessions.create(AgentSessionCreate(session_id="other", agent_id="ada")),
    "move": lambda unit: unit.sessions.move("s", agent_id="bob"),
    "index": lambda unit: unit.sessions.index([unit.sessions.get("s")]),
}


@pytest.mark.parametrize("method", READ_ONLY)
def test_read_only_unit_reads_on(database: Database, method: str) -> None:
    """If a read-only unit refuses a method that locks an agent, the unit can read after the error."""
    add_agent(database)
    add_agent(database, "bob")
    database.sessions.create(AgentSessionCreate(session_id="s", agent_id="ada"))
    with database.unit_of_work(read_only=True) as unit:
        with pytest.raises(errors.ReadOnlyError):
            READ_ONLY[method](unit)
        assert [session.session_id for session in unit.sessions.list()] == ["s"]


def test_read_only_unit_cannot_write(database: Database) -> None:
    """In a read-only unit, writes by stores, the ORM and plain SQL are refused, and no row is written."""
    add_agent(database)
    before = dump(database)
    with database.unit_of_work(read_only=True) as unit:
        with pytest.raises(errors.ReadOnlyError):
            create(unit, "bob")
        with pytest.raises(errors.ReadOnlyError):
            unit.agents.delete("ada")
        with pytest.raises(errors.ReadOnlyError):
            unit.agents.delete("absent")
        assert unit.agents.get("ada").id == "ada"
    with pytest.raises(errors.ReadOnlyError), database.unit_of_work(read_only=True) as unit:
        unit.session.add(orm_agent("orm"))
        unit.session.flush()
    with pytest.raises(errors.ReadOnlyError), database.unit_of_work(read_only=True) as unit:
        unit.session.connection().execute(text("DELETE FROM agents"))
    assert dump(database) == before


def test_stores_and_session_see_the_same_rows(database: Database) -> None:
    """A store reads pending changes of the session, and the session reads changes of a store."""
    with database.unit_of_work() as unit:
        unit.session.add(orm_agent("ada"))
        assert unit.agents.get("ada").name == "Ada"
        loaded = unit.session.get(Agent, "ada")
        assert loaded is not None
        unit.agents.update("ada", AgentUpdate(name="By the store"))
        assert loaded.name == "By the store"
        loaded.name = "By the session"
        assert unit.agents.get("ada").name == "By the session"
        unit.agents.delete("ada")
        assert unit.session.get(Agent, "ada") is None


@pytest.mark.parametrize("is_known", [False, True], ids=["opened inside", "opened before"])
@pytest.mark.parametrize("kind", ["savepoint", "begin_nested", "refused flush", "run_once"])
def test_an_undone_block_leaves_no_values(database: Database, kind: str, is_known: bool) -> None:
    """After an undone block, the session's objects have the values from before the block."""
    add_agent(database)
    rows: list[Agent] = []

    def change(unit: UnitOfWork) -> None:
        create(unit, "new")
        unit.agents.update("ada", AgentUpdate(name="Undone"))
        rows[:] = [unit.session.get_one(Agent, agent_id) for agent_id in ("ada", "new")]
        assert rows[0].name == "Undone"
        if kind == "refused flush":
            unit.session.add(orm_agent("bob"))
            unit.session.flush()
        raise LookupError

    with database.unit_of_work() as unit:
        create(unit, "bob")
        if is_known:
            unit.session.get_one(Agent, "ada")
        with suppress(LookupError, errors.ConflictError):
            if kind == "run_once":
                unit.run_once(IdempotencyScope("d", "m", "k"), lambda attempt: change(unit))
            with unit.savepoint() if kind == "savepoint" else unit.session.begin_nested():
                change(unit)
        assert unit.session.get_one(Agent, "ada").name == rows[0].name == "Ada"
        unit.session.add(orm_agent("new"))
        rows[0].name = "Changed"
    assert (rows[0].name, database.agents.get("ada").name) == ("Changed", "Changed")
    assert agents_of(database) == ["ada", "bob", "new"]


@pytest.mark.parametrize("kind", ["savepoint", "begin_nested"])
def test_an_object_whose_deletion_was_undone(database: Database, kind: str) -> None:
    """If an undone block deleted an object's row, the session still stores later changes of the object."""
    add_agent(database)
    with database.unit_of_work() as unit:
        row = unit.session.get_one(Agent, "ada")
        with suppress(LookupError), unit.savepoint() if kind == "savepoint" else unit.session.begin_nested():
            unit.agents.delete("ada")
            unit.session.add(orm_agent("new"))
            raise LookupError
        row.name = "Changed"
    assert database.agents.get("ada").name == "Changed"


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_a_listener_of_a_flush_assigns(database: Database) -> None:
    """If a listener of `before_update` assigns to a loaded instance, the same flush writes the value."""
    add_agent(database)

    def rename(mapper: Any, connection: Any, agent: Agent) -> None:
        agent.name = "Renamed"

    event.listen(Agent, "before_update", rename)
    try:
        with database.unit_of_work() as unit:
            unit.session.get_one(Agent, "ada").config = {"changed": True}
    finally:
        event.remove(Agent, "before_update", rename)
    assert database.agents.get("ada").name == "Renamed"


def test_stores_return_detached_instances(database: Database) -> None:
    """If an instance from a store changes, the database does not, until a session merges the instance."""
    add_agent(database)
    with database.unit_of_work() as unit:
        agent = unit.agents.get("ada")
        agent.name = "Only here"
    with database.unit_of_work() as unit:
        assert unit.agents.get("ada").name == "Ada"
        unit.session.merge(agent)
    assert database.agents.get("ada").name == "Only here"


@pytest.mark.parametrize("savepoint", [False, True], ids=["unit", "savepoint"])
def test_session_commit_only_flushes(database: Database, savepoint: bool) -> None:
    """The session's commit() only flushes: a later exception still undoes the unit or the savepoint."""
    with suppress(LookupError), database.unit_of_work() as unit:
        if savepoint:
            unit.session.add(orm_agent("kept"))
        with suppress(LookupError) if savepoint else nullcontext(), unit.savepoint() if savepoint else nullcontext():
            unit.session.add(orm_agent("ada"))
            unit.session.commit()
            assert unit.agents.get("ada").name == "Ada"
            raise LookupError
    assert agents_of(database) == (["kept"] if savepoint else [])


@pytest.mark.parametrize("read_only", [False, True])
def test_unit_and_its_stores_are_usable_only_in_the_block(database: Database, read_only: bool) -> None:
    """Before and after the block, the unit and its stores refuse every call. The unit can't be entered twice."""
    unit = database.unit_of_work(read_only=read_only)
    agents = unit.agents
    uses = [unit.rollback, lambda: unit.session, agents.list, lambda: agents.delete("ada")]
    uses += [lambda: unit.after_commit(print), lambda: unit.savepoint().__enter__()]

    def refused() -> None:
        for use in uses:
            with pytest.raises(errors.UnitStateError):
                use()

    refused()
    with unit:
        with pytest.raises(errors.UnitStateError):
            unit.__enter__()
        assert agents.list() == []
    uses.append(unit.__enter__)
    refused()


def test_the_clock_is_unusable_after_the_end(database: Database) -> None:
    """The unit's clock raises after a rollback and after the end of the block."""
    with database.unit_of_work() as unit:
        assert unit.session
        assert unit.now()
        unit.rollback()
        with pytest.raises(errors.UnitStateError, match="rolled back"):
            unit.now()
    with database.unit_of_work() as unit:
        devices = unit.devices
    with pytest.raises(errors.UnitStateError, match="has ended"):
        devices.unit.now()


@pytest.mark.parametrize("rolled_back", [False, True], ids=["ended", "rolled back"])
@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read only"])
def test_session_is_unusable_after_the_end(database: Database, read_only: bool, rolled_back: bool) -> None:
    """If a session is used after its unit, it can't reach the connection, which the next unit has alone."""
    add_agent(database)
    with database.unit_of_work(read_only=read_only) as unit:
        session = unit.session
        assert session.exec(select(Agent.id)).all() == ["ada"]
        if rolled_back:
            unit.rollback()
            with pytest.raises(errors.UnitStateError):
                session.exec(select(Agent.id))
    for use in (
        lambda: session.exec(select(Agent.id)),
        lambda: session.execute(text("DELETE FROM agents")),
        lambda: session.get(Agent, "ada"),
        session.connection,
    ):
        with pytest.raises(errors.UnitStateError):
            use()
    session.add(orm_agent("orm"))
    with pytest.raises(errors.UnitStateError):
        session.commit()
    add_agent(database, "bea")
    assert agents_of(database) == ["ada", "bea"]


@pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
def test_a_listener_of_the_end_writes_nothing(database: Database, fails: bool) -> None:
    """A listener of the session runs after the transaction, so a write in the listener raises UnitStateError."""
    add_agent(database)
    refused: list[object] = []
    with suppress(LookupError), database.unit_of_work() as unit:
        row = unit.session.get(Agent, "ada")  # the session would forget a row without a reference

        @event.listens_for(unit.session, "persistent_to_detached")
        def write(session: object, instance: object) -> None:
            with pytest.raises(errors.UnitStateError):
                create(unit, "bob")
            refused.append(instance)

        if fails:
            raise LookupError
    assert refused == [row]
    assert agents_of(database) == ["ada"]


def test_an_interrupted_rollback_detaches_the_rows(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Ctrl-C interrupts the rollback, the session is closed, so that another unit can take the session's rows."""
    add_agent(database)
    rows = []
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, database.unit_of_work() as unit:
        rows.append(unit.session.get(Agent, "ada"))
        patch.setattr(type(unit._connection), "rollback", Mock(side_effect=KeyboardInterrupt))
        raise LookupError
    with database.unit_of_work() as unit:
        unit.session.add_all(rows)
    assert agents_of(database) == ["ada"]


@pytest.mark.parametrize("orm", [False, True])
@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read only"])
def test_two_threads_in_a_unit_at_a_time(sqlite_database: Database, read_only: bool, orm: bool) -> None:
    """If another thread uses a unit during a statement, the other thread gets UnitStateError, and the unit continues.

    SQLite only: on PostgreSQL, the second statement waits for the first.
    """
    caught: list[BaseException] = []

    def use(unit: UnitOfWork) -> None:
        for by_session in (False, orm):
            try:
                if by_session:
                    unit.session.exec(select(Agent)).all()
                else:
                    unit.agents.list()
            except Exception as error:  # noqa: BLE001  the test checks the class
                caught.append(error)

    def work(unit: UnitOfWork) -> None:
        if orm:
            unit.session.exec(select(Agent)).all()
        connection = unit._require_connection()
        connection.driver_connection.create_scalar_function("meanwhile", lambda: in_threads(lambda: use(unit)))
        connection.execute("SELECT meanwhile()").fetchall()
        if not read_only:
            create(unit, "ada")

    sqlite_database.run(work, read_only=read_only)
    assert [type(error) for error in caught] == [errors.UnitStateError] * 2
    assert agents_of(sqlite_database) == ([] if read_only else ["ada"])


def test_write_units_do_not_nest_in_a_thread(database: Database) -> None:
    """If a thread in a write unit opens another write unit, the second is refused, and the first is unharmed."""
    with database.unit_of_work() as unit:
        create(unit, "ada")
        with pytest.raises(errors.UnitStateError, match="use that unit"), database.unit_of_work():
            raise AssertionError("entered")
    assert agents_of(database) == ["ada"]
    with database.unit_of_work() as unit:
        unit.rollback()
        for act in (database.unit_of_work().__enter__, lambda: database.run(creating("bob"))):
            with pytest.raises(errors.UnitStateError, match="rolled back: leave the block first"):
                act()


class TaskStore(Store):
    pass


class TaskUnit(UnitOfWork):
    task: TaskStore


def test_names_of_own_stores(tmp_path: Path) -> None:
    """An application's unit can have a store with the name `task`."""
    with Database.open(tmp_path / "h.db", unit=TaskUnit) as hub, hub.unit_of_work() as unit:
        assert isinstance(unit.task, TaskStore)


GHOST = text("INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('ghost', 'n', '/', 1)")


@pytest.mark.parametrize("road", ["unit", "run", "read only"])
@pytest.mark.parametrize("how", ["connection", "get_bind"])
def test_kept_connection_does_not_work_after_the_unit(database: Database, road: str, how: str) -> None:
    """A connection of SQLAlchemy that was kept from a unit reads and writes no row after the end of the unit."""
    kept: list[Any] = []

    def keep(unit: UnitOfWork) -> None:
        kept.append(getattr(unit.session, how)())
        kept[0].execute(text("SELECT 1"))

    if road == "unit":
        with database.unit_of_work() as unit:
            keep(unit)
    else:
        database.run(keep, read_only=road == "read only")

    def write() -> None:
        for act in (lambda: kept[0].execute(GHOST), kept[0].begin, lambda: kept[0].execute(text("SELECT 1"))):
            with pytest.raises(errors.UnitStateError):
                act()
        kept[0].commit()

    write()
    with database.unit_of_work() as unit:
        unit.session.add(orm_agent("ada"))
        unit.session.flush()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        create(unit, "bob")
    assert agents_of(database) == ["ada", "bob"]


@pytest.mark.parametrize("road", ["unit", "run"])
def test_a_result_that_is_read_after_the_unit(sqlite_database: Database, road: str) -> None:
    """If the application reads rows after the end of the unit, the error is homeagent's.

    SQLite only: psycopg has already read the rows, and returns them.
    """
    kept: list[Any] = []

    def work(unit: UnitOfWork) -> None:
        for name in ("ada", "bob"):
            create(unit, name)
        kept.append(unit.session.connection().execute(text("SELECT id FROM agents")))

    if road == "run":
        sqlite_database.run(work)
    else:
        with sqlite_database.unit_of_work() as unit:
            work(unit)
    with pytest.raises(errors.HomeAgentError):
        kept[0].all()


@pytest.mark.parametrize("road", ["unit", "run"])
@pytest.mark.parametrize("how", ["unit", "session"])
def test_connection_does_not_write_after_a_rollback(database: Database, road: str, how: str) -> None:
    """After a rollback, the connection of the session stores no row in the rest of the unit."""

    def work(unit: UnitOfWork) -> None:
        connection = unit.session.connection()
        create(unit, "lost")
        (unit if how == "unit" else unit.session).rollback()
        for act in (lambda: connection.execute(GHOST), connection.commit):
            with suppress(errors.UnitStateError):
                act()

    if road == "run":
        database.run(work)
    else:
        with database.unit_of_work() as unit:
            work(unit)
    add_agent(database)
    assert agents_of(database) == ["ada"]


@pytest.mark.parametrize("how", ["unit", "session"])
def test_connection_in_a_batch_does_not_write_after_a_rollback(sqlite_database: Database, how: str) -> None:
    """In a batch, the connection of a unit that was rolled back, or has ended, stores no row. SQLite only."""
    kept: list[Any] = []

    def insert(connection: Any) -> None:
        for act in (lambda: connection.execute(GHOST), connection.commit):
            with suppress(errors.UnitStateError):
                act()

    def undone(unit: UnitOfWork) -> None:
        kept.append(unit.session.connection())
        create(unit, "lost")
        (unit if how == "unit" else unit.session).rollback()
        insert(kept[-1])

    def whole(unit: UnitOfWork) -> str:
        unit.session.add(orm_agent("whole"))
        unit.session.flush()
        kept.append(unit.session.connection())
        return "whole"

    def late(unit: UnitOfWork) -> str:
        for connection in kept:
            insert(connection)
        unit.session.add(orm_agent("late"))
        unit.session.flush()
        return "late"

    run_together(sqlite_database, [creating("one"), undone, whole, late, creating("two")])
    for connection in kept:
        insert(connection)
    assert agents_of(sqlite_database) == ["late", "one", "two", "whole"]


@pytest.mark.parametrize(
    "act",
    [lambda connection: connection.commit(), lambda connection: connection.get_transaction().commit()],
    ids=["connection", "transaction"],
)
def test_connection_does_not_commit_a_part_of_a_unit(database: Database, act: Callable[[Any], object]) -> None:
    """If the application commits the connection or its transaction, the error undoes the whole unit."""

    def work(unit: UnitOfWork) -> None:
        create(unit, "lost")
        act(unit.session.connection())

    with pytest.raises(errors.UnitStateError), database.unit_of_work() as unit:
        work(unit)
    with pytest.raises(errors.UnitStateError):
        database.run(work)
    assert agents_of(database) == []


def test_open_unit_of_a_closed_database_commits(target: str) -> None:
    """A unit that is open during the call of `close()` commits at its end."""
    with Database.open(target) as database, database.unit_of_work() as unit:
        database.close()
        create(unit, "ada")
    with Database.open(target) as database:
        assert agents_of(database) == ["ada"]


def test_closed_database_refuses(database: Database) -> None:
    """A closed database opens no unit, refuses calls of a store and has no doctor, and may be closed twice."""
    database.close()
    database.close()
    with pytest.raises(errors.DatabaseClosedError):
        database.doctor()
    for read_only in (False, True):
        with pytest.raises(errors.DatabaseClosedError), database.unit_of_work(read_only=read_only):
            pass
    for call in (database.devices.find_by_id, database.devices.revoke):
        with pytest.raises(errors.DatabaseClosedError):
            call("lamp")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Return every exception that a traceback of this error would show, with the suppressed exceptions."""
    if error is not None:
        yield error
        yield from chain(error.__cause__)
        yield from chain(error.__context__)


SECRET = "sha256$do-not-tell"
TAKEN = {"id": "lamp", "role": "admin", "shared_secret_hash": SECRET, "paired_at": START}


def flushing(unit: UnitOfWork, row: Table) -> None:
    unit.session.add(row)
    unit.session.flush()


def inserting(unit: UnitOfWork, values: str) -> None:
    insert = text(f"INSERT INTO devices (id, role, shared_secret_hash, paired_at) VALUES ({values}, 0)")
    unit.session.connection().execute(insert.bindparams(secret=SECRET))


REFUSED: dict[str, Callable[[UnitOfWork], None]] = {
    "duplicate device": lambda unit: flushing(unit, Device(**TAKEN)),
    "duplicate device, flushed by the commit": lambda unit: unit.session.add(Device(**TAKEN)),
    "missing agent": lambda unit: flushing(
        unit, AgentSession(session_id=SECRET, agent_id="nobody", created_at=START, last_active_at=START)
    ),
    "bad role": lambda unit: inserting(unit, "'x', 'bogus', :secret"),
    "no hash": lambda unit: inserting(unit, ":secret, 'node', NULL"),
}


@pytest.mark.parametrize("provoke", REFUSED.values(), ids=REFUSED)
def test_driver_errors_are_translated_without_values(
    database: Database, provoke: Callable[[UnitOfWork], None], caplog: pytest.LogCaptureFixture
) -> None:
    """If the ORM inserts a refused row, ConflictError is raised without its values in error, chain or log."""
    add_device(database)
    before = dump(database)
    with caplog.at_level(logging.DEBUG), pytest.raises(errors.ConflictError) as caught, database.unit_of_work() as unit:
        provoke(unit)
    for error in chain(caught.value):
        shown = f"{error!s} {error!r} {error.args} {vars(error)}"
        diagnostics = getattr(error, "diag", None)
        shown += f"{getattr(diagnostics, 'message_detail', '')} {getattr(diagnostics, 'message_primary', '')}"
        assert "do-not-tell" not in shown
    assert isinstance(caught.value, errors.HomeAgentError)
    assert "do-not-tell" not in caplog.text
    assert dump(database) == before
    add_agent(database)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_stopping_clock_error_passes_through(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the injected clock raises, the exception passes unwrapped and the unit is rolled back."""

    def broken() -> None:
        raise LookupError("no time")

    with pytest.raises(LookupError, match="no time"), database.unit_of_work() as unit:
        create(unit, "ada")
        monkeypatch.setattr(database._settings, "clock", broken)
        create(unit, "bob")
    assert agents_of(database) == []


def test_a_signal_handler_never_waits_for_its_own_thread(sqlite_path: Path) -> None:
    """If a signal's handler opens a unit in a unit, the handler's unit is refused or done, and the write lock is free.

    SQLite only: the file has a single write lock.
    """
    modules = {"homeagent.unit_of_work", "homeagent.transaction", "homeagent.pool"}

    def use() -> None:
        with suppress(errors.UnitStateError), database.unit_of_work():
            pass

    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=50), durability="normal") as database:
        use()
        turn = 0
        while interrupt_at(turn, modules, use, use):
            use()
            turn += 1
    assert turn > 10
