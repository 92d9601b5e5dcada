"""Group commit: the longest wait of a caller, and the events that remove a caller from the queue.

SQLite only: PostgreSQL groups commits without homeagent.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from homeagent import Database, UnitOfWork
from homeagent.engine.connection import StoreConnection
from homeagent.errors import DatabaseBusyError, DatabaseClosedError, DatabaseError
from tests.batches import Work, agents_of, create, creating, group_commit_of, held, outcome_of, wait_for_calls
from tests.conftest import FakeClock, add_agent, dump, in_threads


@pytest.fixture
def impatient(sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database whose units wait for 400 ms at most; a batch lasts for a quarter of the timeout at most."""
    monkeypatch.setattr("homeagent.group_commit._MAX_BATCH_SECONDS", 60)
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(milliseconds=400)) as database:
        yield database


def test_a_waiting_block_gets_its_turn_between_batches(sqlite_database: Database) -> None:
    """While 8 threads run units without a pause, a thread that uses blocks gets its turns between their batches."""
    stop = threading.Event()

    def busy(number: int) -> None:
        while not stop.is_set():
            sqlite_database.run(lambda unit: unit.agents.find_by_id(f"x{number}"))

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            add_agent(sqlite_database, f"a{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert len(agents_of(sqlite_database)) == 20


@pytest.mark.parametrize("coroutines", [False, True], ids=["threads", "coroutines"])
def test_no_caller_waits_longer_than_the_timeout(impatient: Database, coroutines: bool) -> None:
    """After the timeout, each caller's error names the thread that holds the write lock; then units run as before."""
    errors: list[Any] = []
    works = [creating(f"late {number}") for number in range(4)]

    async def main() -> None:
        errors.extend(await asyncio.gather(*map(impatient.arun, works), return_exceptions=True))

    def call(work: Work) -> None:
        errors.append(outcome_of(lambda: impatient.run(work)))

    with held(impatient):
        if coroutines:
            asyncio.run(main())
        else:
            in_threads(*(functools.partial(call, work) for work in works))
    assert [type(error) for error in errors] == [DatabaseBusyError] * 4
    assert all("'the slow one' has held it for" in str(error) for error in errors)
    assert impatient._engine.counters.snapshot().pool_waits >= 4
    assert impatient.run(creating("ada")) == "ada"
    assert agents_of(impatient) == ["ada"]


def test_without_a_timeout_a_free_write_lock_is_enough(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a busy_timeout of 0, a unit that the writer thread starts at once does not count as waiting."""
    # On a busy machine the writer thread can start later than the first check of the caller.
    monkeypatch.setattr("homeagent.group_commit._MIN_CHECK_INTERVAL", 60)
    with Database.open(sqlite_path, busy_timeout=timedelta(0)) as database:
        assert asyncio.run(database.arun(creating("ada"))) == "ada"
        group_commit_of(database)._is_contended = True
        assert database.run(creating("bob")) == "bob"


def test_a_hanging_function_delays_no_other_caller(impatient: Database) -> None:
    """If a function hangs, the callers before and behind get an error with its name, and their units are not stored.

    The callers get the error while the function hangs. When the function ends, its unit runs alone in a separate
    transaction.
    """
    go_on, hanging = threading.Event(), threading.Event()
    outcomes: dict[str, Any] = {}
    called: list[str] = []

    def caller(name: str, work: Work) -> threading.Thread:
        return threading.Thread(
            target=lambda: outcomes.update({name: outcome_of(lambda: impatient.run(work))}), name=name
        )

    def hang(unit: UnitOfWork) -> str:
        called.append("hang")
        hanging.set()
        assert go_on.wait(10)
        return create(unit, "hung")

    def begin(unit: UnitOfWork) -> str:
        for number, thread in enumerate((second, hangs)):
            thread.start()
            wait_for_calls(impatient, number + 1)
        unit.after_commit(lambda: called.append("never"))
        return create(unit, "first")

    hangs = caller("the hanging one", hang)
    second = caller("second", creating("second"))
    threads = [caller("first", begin), second, caller("third", creating("third"))]
    group_commit_of(impatient)._is_contended = True  # the first caller also puts its unit in the queue
    threads[0].start()
    assert hanging.wait(30)
    threads[2].start()
    for thread in threads:
        thread.join(30)
    outcomes["block"] = outcome_of(lambda: add_agent(impatient))
    assert "the hanging one" not in outcomes
    assert sorted(outcomes) == ["block", "first", "second", "third"]
    for outcome in outcomes.values():
        assert isinstance(outcome, DatabaseBusyError)
        assert "'homeagent-writer' has held it for" in str(outcome)
        assert "hang for thread 'the hanging one' since" in str(outcome)
    go_on.set()
    hangs.join(30)
    assert outcomes["the hanging one"] == "hung"
    assert agents_of(impatient) == ["hung"]
    assert called == ["hang", "hang"]
    assert impatient.run(creating("ada")) == "ada"


@pytest.mark.parametrize("cancelled", [False, True], ids=["waiting", "cancelled"])
def test_a_hanging_function_delays_no_coroutine(impatient: Database, cancelled: bool) -> None:
    """If a function hangs, a coroutine whose unit ran in the batch leaves in time, also after a cancellation."""
    go_on, hanging = threading.Event(), threading.Event()

    def hang(unit: UnitOfWork) -> str:
        hanging.set()
        assert go_on.wait(10)
        return create(unit, "hung")

    def begin(unit: UnitOfWork) -> str:
        wait_for_calls(impatient, 1)
        unit.after_commit(lambda: pytest.fail("it was given up"))
        return create(unit, "first")

    async def main() -> None:
        first = asyncio.ensure_future(impatient.arun(begin))
        hangs = asyncio.ensure_future(impatient.arun(hang))
        assert await anyio.to_thread.run_sync(hanging.wait, 30)
        if cancelled:
            first.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else DatabaseBusyError) as caught:
            await first
        if not cancelled:
            assert caught.match("hang for a coroutine since")
        with pytest.raises(DatabaseBusyError, match="homeagent-writer"):
            await impatient.arun(creating("late"))
        assert not hangs.done()
        go_on.set()
        assert await hangs == "hung"

    asyncio.run(main())
    assert agents_of(impatient) == ["hung"]


def test_no_caller_leaves_a_batch_that_commits(impatient: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the decision to commit, no caller times out, as `busy` would be false for a unit that is stored."""
    commit = StoreConnection.commit

    def slow(link: StoreConnection) -> None:
        if not link.read_only:
            threading.Event().wait(1)
        commit(link)

    group_commit_of(impatient)._is_contended = True
    monkeypatch.setattr(StoreConnection, "commit", slow)
    assert impatient.run(creating("a")) == "a"
    assert asyncio.run(impatient.arun(creating("b"))) == "b"


def test_a_unit_whose_caller_got_busy_is_not_stored(sqlite_path: Path) -> None:
    """If functions run for about as long as callers wait, exactly the units whose calls returned are stored."""
    gave_up: list[str] = []
    returned: list[str] = []

    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=8), durability="normal") as database:

        def call(caller: int) -> None:
            for number in range(25):
                name = f"{caller}-{number}"

                def work(unit: UnitOfWork, name: str = name, number: int = number) -> None:
                    create(unit, name)
                    time.sleep(0.001 * ((caller * 7 + number * 3) % 10))

                outcome = outcome_of(functools.partial(database.run, work))
                assert outcome is None or isinstance(outcome, DatabaseBusyError)
                (returned if outcome is None else gave_up).append(name)

        in_threads(*(functools.partial(call, caller) for caller in range(8)))
        assert len(gave_up) + len(returned) == 200
        assert gave_up
        assert returned
        assert {row[0] for row in dump(database)["agents"]} == set(returned)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["thread", "memory"])
def test_units_of_threads_run_without_a_writer_thread(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """If the system has no thread left, each thread runs its unit itself, and a coroutine gets DatabaseError."""
    group_commit_of(sqlite_database)._is_contended = True

    def refuse(thread: threading.Thread) -> None:
        raise error

    async def coroutines() -> list[Any]:
        calls = [sqlite_database.arun(creating(f"c{number}")) for number in range(50)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr("homeagent.group_commit.threading.Thread.start", refuse)
        refusals = asyncio.run(coroutines())
        assert [type(refusal) for refusal in refusals] == [DatabaseError] * 50
        assert type(error).__name__ in str(refusals[0])
        assert sqlite_database.run(creating("thread")) == "thread"
    assert asyncio.run(sqlite_database.arun(creating("later"))) == "later"
    assert agents_of(sqlite_database) == ["later", "thread"]


def test_the_writer_thread_ends_when_it_is_idle(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the writer thread is idle, the thread ends; the next call starts a thread, and a dropped database is freed."""
    monkeypatch.setattr("homeagent.group_commit._IDLE", 0.05)
    database = Database.open(sqlite_path)
    for name in ("ada", "bob"):
        assert asyncio.run(database.arun(creating(name))) == name
        thread = group_commit_of(database)._thread
        if thread is not None:
            thread.join(30)
        assert group_commit_of(database)._thread is None
    gone = weakref.ref(group_commit_of(database))
    database.close()
    del database, thread
    gc.collect()
    assert gone() is None


def test_a_loop_that_cannot_be_notified_delays_no_other_caller(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a loop can't be notified, its coroutines get their outcome within the timeout, and other callers at once."""

    async def main() -> str:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        failures = [MemoryError()]

        def fail_once(*arguments: Any, **options: Any) -> Any:
            if failures:
                raise failures.pop()
            return wake(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", fail_once)
        first: str = await asyncio.wait_for(database.arun(creating("a")), 20)
        assert not failures
        second: str = await asyncio.wait_for(database.arun(creating("b")), 20)
        return first + second

    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=300)) as database:
        assert asyncio.run(main()) == "ab"
        assert database.run(creating("c")) == "c"
    assert [getattr(record, "event", None) for record in caplog.records] == ["writer_failed"]


@pytest.mark.parametrize("hangs", [False, True], ids=["a block", "a function"])
def test_closing_refuses_callers_that_wait(
    sqlite_path: Path, hangs: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing refuses waiting callers at once, waits for a function until the timeout, and lets the function commit."""
    errors: list[type[BaseException]] = []
    go_on, entered = threading.Event(), threading.Event()
    database = Database.open(sqlite_path, busy_timeout=timedelta(seconds=20))

    def hang(unit: UnitOfWork) -> None:
        entered.set()
        assert go_on.wait(10)
        create(unit, "hung")

    def block() -> None:
        with database.unit_of_work() as unit:
            hang(unit)

    def call(number: int) -> None:
        errors.append(type(outcome_of(lambda: database.run(creating(f"late {number}")))))

    async def coroutines() -> None:
        calls = [database.arun(creating(f"late {number}")) for number in range(10, 13)]
        errors.extend(map(type, await asyncio.gather(*calls, return_exceptions=True)))

    group_commit_of(database)._is_contended = True  # the writer thread runs the function
    holder = threading.Thread(target=functools.partial(database.run, hang) if hangs else block)
    holder.start()
    assert entered.wait(30)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=asyncio.run, args=(coroutines(),)))
    for thread in threads:
        thread.start()
    wait_for_calls(database, 6)
    monkeypatch.setattr(database._settings, "timeout", 0.3)
    database.close()
    for thread in threads:
        thread.join(30)
    assert errors == [DatabaseClosedError] * 6
    assert [getattr(record, "event", None) for record in caplog.records] == ["unit_hangs"] * hangs
    go_on.set()
    holder.join(30)
    with pytest.raises(DatabaseClosedError):
        database.run(hang)
    with pytest.raises(DatabaseClosedError):
        asyncio.run(database.arun(hang))
    while [thread for thread in threading.enumerate() if thread.name == "homeagent-writer"]:
        time.sleep(0.001)
    with Database.open(sqlite_path) as again:
        assert agents_of(again) == ["hung"]
