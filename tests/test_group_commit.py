"""Group commit: units that share a commit behave like units with separate commits, whatever the other units do.

SQLite only, except for the test on PostgreSQL, which groups commits without homeagent.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Agent, Database, UnitOfWork
from homeagent.engine.connection import StoreConnection
from homeagent.errors import AgentExistsError, ConflictError, DiskFullError, UnitStateError
from tests.batches import Odd, Work, agents_of, counted_commits, create, creating, group_commit_of, run_together
from tests.conftest import START, Children

BOTH = pytest.mark.parametrize("coroutines", [False, True], ids=["threads", "coroutines"])


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a batch take all waiting calls, however slow the machine is."""
    monkeypatch.setattr("homeagent.group_commit._MAX_BATCH_SECONDS", 60)


@BOTH
def test_units_that_wait_share_one_commit(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, coroutines: bool
) -> None:
    """If ten units wait for the write lock, a single thread commits the units together, each with a separate result."""
    threads: set[str] = set()

    def work(unit: UnitOfWork, agent_id: str) -> str:
        threads.add(threading.current_thread().name)
        return create(unit, agent_id)

    works = [functools.partial(work, agent_id=f"a{number}") for number in range(10)]
    with counted_commits(monkeypatch) as count:
        results = run_together(sqlite_database, works, coroutines=coroutines)
    assert results == [f"a{number}" for number in range(10)]
    assert count == [1]
    assert threads == {"homeagent-writer"}
    assert agents_of(sqlite_database) == sorted(results)
    snapshot = sqlite_database._engine.counters.snapshot()
    assert (snapshot.groups, snapshot.group_size_p50, snapshot.commits, snapshot.rollbacks) == (1, 10, 10, 1)
    # The first unit of a batch may find that the write lock was just released.
    assert snapshot.pool_waits in (9, 10)


def test_a_lone_caller_runs_its_unit_in_its_own_thread(sqlite_database: Database) -> None:
    """If no other caller waits, the unit runs in the caller's thread in a plain transaction, with an ORM session."""

    def work(unit: UnitOfWork) -> threading.Thread:
        unit.session.add(Agent(id="ada", name="Ada", workspace_path="/ada", created_at=START))
        return threading.current_thread()

    assert sqlite_database.run(work) is threading.current_thread()
    assert group_commit_of(sqlite_database)._thread is None
    assert agents_of(sqlite_database) == ["ada"]


def test_a_batch_is_bounded(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch ends after its maximum of units or its maximum duration, and the next batch begins."""
    monkeypatch.setattr("homeagent.group_commit._MAX_BATCH_UNITS", 4)
    with counted_commits(monkeypatch) as count:
        run_together(sqlite_database, [creating(f"a{number}") for number in range(11)])
    assert count == [3]
    with counted_commits(monkeypatch) as count:
        run_together(sqlite_database, [creating(f"b{number}") for number in range(4)], seconds=0)
    assert count == [4]


def raising(unit: UnitOfWork, error: BaseException) -> None:
    create(unit, "raised")
    raise error


def rolling_back(unit: UnitOfWork) -> str:
    """Write a row, roll the unit back, and try to use the unit again."""
    create(unit, "given up")
    unit.after_commit(lambda: pytest.fail("never committed"))
    unit.rollback()
    unit.rollback()
    for act in (lambda: create(unit, "too late"), lambda: unit.session):
        with pytest.raises(UnitStateError, match="rolled back"):
            act()
    return "gave up"


left_open: list[Any] = []


def leaving_savepoints(unit: UnitOfWork) -> None:
    """Raise an error in two savepoints that do not end. Without a reference, garbage collection would end them."""
    for number in range(2):
        left_open.append(unit.savepoint())
        left_open[-1].__enter__()
        create(unit, f"in savepoint {number}")
    raise LookupError


def refused(unit: UnitOfWork) -> None:
    create(unit, "raised")
    create(unit, "raised")


def recursing(unit: UnitOfWork) -> None:
    create(unit, "raised")

    def again() -> None:
        again()

    again()


@BOTH
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (functools.partial(raising, error=LookupError("x")), LookupError),
        (functools.partial(raising, error=SystemExit(3)), SystemExit),
        (functools.partial(raising, error=GeneratorExit()), GeneratorExit),
        (functools.partial(raising, error=MemoryError()), MemoryError),
        (functools.partial(raising, error=Odd()), Odd),
        (recursing, RecursionError),
        (refused, AgentExistsError),
        (leaving_savepoints, LookupError),
        (rolling_back, "gave up"),
    ],
)
def test_an_undone_unit_undoes_no_other_unit(sqlite_path: Path, bad: Work, expected: Any, coroutines: bool) -> None:
    """If a unit raises or rolls back at any place in a batch, the other units are kept."""
    if expected in (SystemExit, GeneratorExit):
        coroutines = False  # such an error ends the event loop
    for position in range(3):
        works = [creating(f"ada {position}"), creating(f"bob {position}")]
        works.insert(position, bad)
        with Database.open(sqlite_path, durability="normal") as database:
            results = run_together(database, works, coroutines=coroutines)
            result = results.pop(position)
            assert result == expected or isinstance(result, expected)
            assert results == [f"ada {position}", f"bob {position}"]
            assert len(agents_of(database)) == 2 * (position + 1)


@BOTH
def test_units_with_an_orm_session_share_the_commit(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, coroutines: bool
) -> None:
    """A unit with an ORM session stays in its batch. If its flush fails or it rolls back, only this unit is undone."""
    runs: list[str] = []

    def orm(unit: UnitOfWork, store: str, agent_id: str, end: Callable[[UnitOfWork], object] = bool) -> str:
        runs.append(store)
        create(unit, store)
        unit.session.add(Agent(id=agent_id, name="Orm", workspace_path="/orm", created_at=START))
        end(unit)
        return store

    def fail(unit: UnitOfWork) -> None:
        with pytest.raises(ConflictError):
            unit.session.flush()
        with pytest.raises(UnitStateError):
            unit.agents.list()

    def close(unit: UnitOfWork) -> None:
        unit.session.flush()
        unit.session.close()

    works: list[Work] = [
        functools.partial(orm, store="s1", agent_id="o1"),
        functools.partial(orm, store="s2", agent_id="o2", end=lambda unit: unit.session.rollback()),
        functools.partial(orm, store="s3", agent_id="o1", end=lambda unit: unit.agents.list()),
        functools.partial(orm, store="s4", agent_id="o4", end=lambda unit: unit.session.begin_nested()),
        functools.partial(orm, store="s5", agent_id="o1", end=fail),
        functools.partial(orm, store="s6", agent_id="o1"),
        functools.partial(orm, store="s7", agent_id="o7", end=close),
        creating("ada"),
    ]
    with counted_commits(monkeypatch) as count:
        results = run_together(sqlite_database, works, coroutines=coroutines)
    assert [result for result in results if isinstance(result, str)] == ["s1", "s2", "s4", "s5", "s7", "ada"]
    assert isinstance(results[2], ConflictError)
    assert isinstance(results[5], ConflictError)
    assert agents_of(sqlite_database) == ["ada", "o1", "o4", "o7", "s1", "s4", "s7"]
    assert runs == ["s1", "s2", "s3", "s4", "s5", "s6", "s7"]
    assert count == [1]


@pytest.mark.parametrize(
    "end",
    [
        lambda unit: unit.session.execute(text("COMMIT")),
        lambda unit: unit._connection.execute("ROLLBACK"),
        lambda unit: unit.session.connection().close(),
    ],
    ids=["COMMIT", "ROLLBACK", "close"],
)
def test_a_batch_whose_transaction_has_ended_runs_its_units_alone(sqlite_database: Database, end: Work) -> None:
    """If a unit sends COMMIT or closes the connection, or SQLite rolls back, each unit is stored once."""
    broken: list[int] = []

    def breaking(unit: UnitOfWork) -> str:
        if not broken:
            broken.append(1)
            end(unit)
            raise DiskFullError("no room")
        return create(unit, "again")

    assert run_together(sqlite_database, [creating("a"), breaking, creating("b")]) == ["a", "again", "b"]
    assert agents_of(sqlite_database) == ["a", "again", "b"]


def test_a_unit_cannot_be_used_after_its_end(sqlite_database: Database) -> None:
    """If a unit is used after its end, UnitStateError prevents a write into the next unit of the batch."""
    kept: list[UnitOfWork] = []

    def meddle(unit: UnitOfWork) -> None:
        for other in kept:
            with pytest.raises(UnitStateError):
                create(other, "smuggled")
            with pytest.raises(UnitStateError):
                other.rollback()
        kept.append(unit)

    assert run_together(sqlite_database, [meddle] * 4) == [None] * 4
    assert len(kept) == 4
    assert agents_of(sqlite_database) == []


def test_a_unit_in_a_unit_is_refused(sqlite_database: Database) -> None:
    """If a unit opens a unit in the same thread, UnitStateError prevents a wait of the thread for itself."""

    def nested(unit: UnitOfWork) -> None:
        sqlite_database.run(lambda unit: None)

    def block(unit: UnitOfWork) -> None:
        with sqlite_database.unit_of_work():
            pass

    assert [type(result) for result in run_together(sqlite_database, [nested, block])] == [UnitStateError] * 2
    waiting = threading.Thread(target=sqlite_database.run, args=(creating("waits"),))
    with sqlite_database.unit_of_work() as unit:
        with pytest.raises(UnitStateError):
            nested(unit)
        waiting.start()
        while not sqlite_database._engine.writers._waiters:
            threading.Event().wait(0.001)
        with pytest.raises(UnitStateError):
            nested(unit)
        create(unit, "ada")
    waiting.join(30)
    assert agents_of(sqlite_database) == ["ada", "waits"]


# Commits that fail


FULL_DISK = """
import resource, sys
from homeagent import Database
from tests.batches import agents_of, create, run_together
runs = []

def work(unit, name):
    runs.append(name)
    if runs.count(name) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    elif len(runs) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    return create(unit, name)

with Database.open(sys.argv[1]) as database:
    database.run(lambda unit: create(unit, "before"))
    works = [lambda unit, name=name: work(unit, name) for name in "abc"]
    print(*run_together(database, works))
    print(*runs[:3], len(runs))
with Database.open(sys.argv[1]) as database:
    print(*agents_of(database))
"""


def test_a_full_disk_at_the_common_commit_loses_no_unit(sqlite_path: Path, children: Children) -> None:
    """If SQLite fails to write the WAL of a batch, each unit runs again alone and is stored once."""
    output = children.run(FULL_DISK, sqlite_path)
    assert output.splitlines() == ["a b c", "a b c 6", "a b before c"]


def test_a_savepoint_that_cannot_be_undone_undoes_no_other_unit(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a savepoint can't be rolled back, the batch is rolled back and each unit runs alone."""

    def failing(link: StoreConnection, name: str) -> None:
        raise DiskFullError("no room")

    monkeypatch.setattr(StoreConnection, "rollback_to_savepoint", failing)
    works = [creating("a"), functools.partial(raising, error=LookupError("mine")), creating("b")]
    results = run_together(sqlite_database, works)
    assert results[::2] == ["a", "b"]
    assert isinstance(results[1], LookupError)
    assert agents_of(sqlite_database) == ["a", "b"]


@BOTH
def test_a_commit_error_reaches_only_its_caller(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, coroutines: bool
) -> None:
    """If a unit fails to commit alone or after its batch, its caller gets the error, and no callback or row is left."""
    called: list[str] = []
    error = DiskFullError("no room")

    def work(unit: UnitOfWork, name: str) -> str:
        unit.after_commit(functools.partial(called.append, name))
        return create(unit, name)

    works = [functools.partial(work, name=name) for name in ("a", "b", "c")]
    with counted_commits(monkeypatch, error), pytest.raises(DiskFullError):
        sqlite_database.run(works[0])
    with counted_commits(monkeypatch, error, error, error, error):
        assert run_together(sqlite_database, works, coroutines=coroutines) == [error] * 3
    assert (called, agents_of(sqlite_database)) == ([], [])
    with counted_commits(monkeypatch, error, None, error):
        results = run_together(sqlite_database, works, coroutines=coroutines)
    assert results.count(error) == 1
    kept = [result for result in results if result is not error]
    assert sorted(called) == agents_of(sqlite_database) == kept


def test_callbacks_run_in_their_callers_thread_after_the_commit(sqlite_database: Database) -> None:
    """Callbacks run in the thread of their caller after the commit is durable, and may open units."""
    seen: list[tuple[str, bool, str]] = []

    def work(unit: UnitOfWork, name: str) -> None:
        create(unit, name)
        unit.after_commit(
            lambda: seen.append((name, name in agents_of(sqlite_database), threading.current_thread().name))
        )
        unit.after_commit(lambda: sqlite_database.run(creating(f"after {name}")))

    run_together(sqlite_database, [functools.partial(work, name=f"caller {number}") for number in range(3)])
    assert sorted(seen) == [(name, True, name) for name in ("caller 0", "caller 1", "caller 2")]
    assert len(agents_of(sqlite_database)) == 6


def test_callbacks_of_coroutines_do_not_block_the_loop(sqlite_database: Database) -> None:
    """Callbacks of coroutines run in a worker thread with the caller's context; a failing callback hides no result."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    seen: list[tuple[str, bool]] = []

    def work(unit: UnitOfWork) -> str:
        unit.after_commit(lambda: 1 / 0)
        unit.after_commit(lambda: seen.append((name.get(), threading.current_thread() is main_thread)))
        return create(unit, name.get())

    async def caller(mine: str) -> None:
        name.set(mine)
        assert await sqlite_database.arun(work) == mine
        assert (mine, False) in seen

    async def main() -> None:
        await asyncio.gather(*(caller(f"c{number}") for number in range(5)))

    main_thread = threading.current_thread()
    asyncio.run(main())
    assert len(seen) == 5


def test_callbacks_run_after_a_cancellation(sqlite_database: Database) -> None:
    """If a coroutine is cancelled while its callback waits for a worker thread, the callback still runs."""
    let_go = threading.Event()
    called: list[bool] = []

    def work(unit: UnitOfWork) -> None:
        create(unit, "ada")
        unit.after_commit(lambda: called.append(True))

    async def main() -> None:
        # As many callbacks as there are worker threads
        others = [
            asyncio.ensure_future(sqlite_database.arun(lambda unit: unit.after_commit(let_go.wait))) for _ in range(64)
        ]
        await asyncio.sleep(0)
        task = asyncio.ensure_future(sqlite_database.arun(work))
        for _ in iter(lambda: agents_of(sqlite_database) == ["ada"], True):
            await asyncio.sleep(0)
        for _ in range(200):
            task.cancel()
            await asyncio.sleep(0)
        let_go.set()
        await asyncio.wait([task, *others])
        assert task.cancelled()

    asyncio.run(main())
    assert called == [True]


def test_the_work_sees_the_callers_context(sqlite_database: Database) -> None:
    """In the writer thread, the function sees the context variables of its caller."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    name.set("mine")
    group_commit_of(sqlite_database)._is_contended = True
    seen = sqlite_database.run(lambda unit: (name.get(), threading.current_thread().name))
    assert seen == ("mine", "homeagent-writer")
