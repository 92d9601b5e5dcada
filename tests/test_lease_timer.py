"""A single thread per database renews the leases of running effects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import Mock

import anyio
import anyio.to_thread
import pytest
from sqlmodel import update

from homeagent import Attempt, Database, IdempotencyKey, IdempotencyScope, UnitOfWork
from homeagent.errors import DatabaseClosedError, IdempotencyInProgressError
from homeagent.idempotency import LeaseTimer, OnceCall
from homeagent.stores import IdempotencyKeyStore
from tests.conftest import Children, FakeClock


def scope_of(key: str) -> IdempotencyScope:
    return IdempotencyScope("lamp", "orders.create", key)


def lease_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "homeagent-lease"]


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], threading.Semaphore]:
    """Return, for a key, the semaphore that each committed renewal of the key releases."""
    made: dict[str, threading.Semaphore] = {}
    renew = IdempotencyKeyStore.renew

    def of(key: str) -> threading.Semaphore:
        return made.setdefault(key, threading.Semaphore(0))

    def counted(self: Any, attempt: Attempt, *, lease: timedelta) -> Attempt:
        self._unit.after_commit(of(attempt.scope.key).release)
        return renew(self, attempt, lease=lease)

    monkeypatch.setattr(IdempotencyKeyStore, "renew", counted)
    return of


def test_one_thread_for_all_effects(
    database: Database, monkeypatch: pytest.MonkeyPatch, renewals: Callable[[str], threading.Semaphore]
) -> None:
    """A single thread renews the leases of 16 concurrent effects several times, and ends after the last effect."""
    monkeypatch.setattr(OnceCall, "period", 0.002)
    all_run = threading.Barrier(16)

    def effect(attempt: Attempt) -> int:
        all_run.wait(30)
        assert all(renewals(attempt.scope.key).acquire(timeout=30) for _ in range(3))
        all_run.wait(30)
        return len(lease_threads())

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda n: database.run_once(scope_of(f"k-{n}"), effect), range(16)))
    assert [outcome.value for outcome in outcomes] == [1] * 16
    for thread in lease_threads():
        thread.join(30)
    assert not lease_threads()


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_short_effects_share_a_thread(database: Database) -> None:
    """If effects are shorter than a third of their lease, a single thread serves the functions and coroutines."""
    before, seen = set(lease_threads()), set[threading.Thread]()  # threads of other tests can still wait

    def quick(attempt: Attempt) -> None:
        seen.update(lease_threads())

    async def coroutine(attempt: Attempt) -> None:
        quick(attempt)

    async def coroutines() -> None:
        for number in range(20):
            await database.arun_once(scope_of(f"a-{number}"), coroutine, lease=timedelta(days=1))

    for number in range(20):
        database.run_once(scope_of(f"k-{number}"), quick, lease=timedelta(days=1))
    anyio.run(coroutines)
    assert len(seen - before) == 1


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_a_shorter_lease_wakes_the_thread(database: Database, renewals: Callable[[str], threading.Semaphore]) -> None:
    """While the thread sleeps until the renewal of a long lease, a short lease is still renewed in time."""

    def short(attempt: Attempt) -> bool:
        return renewals("short").acquire(timeout=30)

    def long(attempt: Attempt) -> Any:
        return database.run_once(scope_of("short"), short, lease=timedelta(milliseconds=30)).value

    assert database.run_once(scope_of("long"), long, lease=timedelta(days=1)).value is True
    assert not renewals("long").acquire(blocking=False)


@pytest.mark.parametrize("backend", [None, "asyncio", "trio"])
def test_a_long_effect_keeps_its_lease(
    database: Database,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    renewals: Callable[[str], threading.Semaphore],
    backend: str | None,
) -> None:
    """If an effect lasts three leases' length, its lease is renewed, and other callers see the key in progress."""
    monkeypatch.setattr(OnceCall, "period", 0.002)
    lease = timedelta(minutes=1)

    def effect(attempt: Attempt) -> str:
        for _ in range(6):
            clock.advance(lease / 2)
            while renewals("k").acquire(blocking=False):
                pass  # a renewal before the clock moved
            assert all(renewals("k").acquire(timeout=30) for _ in range(2))
        with pytest.raises(IdempotencyInProgressError) as refusal:
            database.run_once(scope_of("k"), lambda attempt: None, on_abandoned="rerun")
        assert refusal.value.retry_after == lease
        return "long"

    async def coroutine(attempt: Attempt) -> str:
        return await anyio.to_thread.run_sync(effect, attempt)

    if backend is None:
        outcome = database.run_once(scope_of("k"), effect, lease=lease)
    else:
        outcome = anyio.run(partial(database.arun_once, scope_of("k"), coroutine, lease=lease), backend=backend)
    assert outcome.value == "long"


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_no_thread_to_renew_with(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system can't start the renewing thread, the effect does not begin, and the key is free."""
    effect = Mock()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="new thread"):
            database.run_once(scope_of("k"), effect)
    effect.assert_not_called()
    assert database.idempotency_keys.find(scope_of("k")) is None


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_another_thread_is_started(
    database: Database, monkeypatch: pytest.MonkeyPatch, renewals: Callable[[str], threading.Semaphore]
) -> None:
    """After a failed start of the thread, and after the end of the thread, another thread renews the next lease."""
    monkeypatch.setattr(OnceCall, "period", 0.002)
    before = set(lease_threads())  # threads of other tests can still wait
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="new thread"):
            database.run_once(scope_of("k-0"), Mock())
    for key in ("k-1", "k-2"):
        outcome = database.run_once(scope_of(key), lambda attempt: renewals(attempt.scope.key).acquire(timeout=10))
        assert outcome.value is True
        for thread in set(lease_threads()) - before:
            thread.join(10)


def test_close_ends_the_thread(target: str, clock: FakeClock) -> None:
    """If the database closes while an effect runs, the sleeping thread ends."""
    database = Database.open(target, clock=clock)

    def effect(attempt: Attempt) -> None:
        thread = lease_threads()[-1]  # threads of other tests can still wait for their leases
        database.close()
        thread.join(10)
        assert not thread.is_alive()

    with pytest.raises(DatabaseClosedError):
        database.run_once(scope_of("k"), effect, lease=timedelta(days=1))


def test_a_clock_that_fails(
    target: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    renewals: Callable[[str], threading.Semaphore],
) -> None:
    """If the application's clock raises during a renewal, the error is logged, and the same thread tries again."""
    monkeypatch.setattr(OnceCall, "period", 0.002)
    failures = iter([ValueError("no signal")])

    def fails_once() -> Any:
        if threading.current_thread().name == "homeagent-lease" and (error := next(failures, None)):
            raise error
        return clock()

    with Database.open(target, clock=fails_once) as database:
        outcome = database.run_once(scope_of("k"), lambda attempt: renewals("k").acquire(timeout=30))
    assert outcome.value is True
    (record,) = (record for record in caplog.records if record.message.startswith("a lease could not be renewed"))
    assert "no signal" in record.message


def test_an_effect_that_ends_before_its_renewal(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the effect ends while its renewal waits for the write lock, the lease is not extended."""
    monkeypatch.setattr(OnceCall, "period", 0.002)
    scope, hour, begun, end = scope_of("k"), timedelta(hours=1), threading.Event(), threading.Event()
    call = OnceCall(scope, "", hour, hour, "refuse")

    def run_later(work: Callable[[UnitOfWork], Any]) -> Any:
        begun.set()
        assert end.wait(30)
        return database.run(work)

    attempt = database.run(call.claim)
    assert isinstance(attempt, Attempt)
    stop = LeaseTimer(run_later).renew(replace(call, lease=2 * hour), attempt)
    thread = lease_threads()[-1]  # threads of other tests can still wait for their leases
    assert begun.wait(30)
    stop()
    end.set()
    thread.join(30)
    with database.unit_of_work(read_only=True) as unit:
        row = unit.idempotency_keys.find(scope)
    assert row is not None
    assert row.lease_expires_at == attempt.lease_expires_at


def test_a_row_that_stays_locked(
    target: str,
    engine_name: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    renewals: Callable[[str], threading.Semaphore],
) -> None:
    """If another unit locks the row of a lease, other leases wait for at most a `busy_timeout`, and are renewed.

    On SQLite a unit locks the whole database, so no lease can be renewed during the unit.
    """
    monkeypatch.setattr(OnceCall, "period", 0.002)
    busy_timeout = timedelta(milliseconds=300)

    def effect(attempt: Attempt) -> bool:
        return renewals(attempt.scope.key).acquire(timeout=30)

    def held(attempt: Attempt) -> bool:
        with database.unit_of_work() as unit:
            same = IdempotencyKey.key == "held"
            unit.session.exec(update(IdempotencyKey).where(same).values(method=IdempotencyKey.method))
            while not any("could not be renewed" in record.message for record in caplog.records):
                renewals("held").acquire(timeout=0.01)  # a renewal may precede the lock of the row
            if engine_name == "postgresql":
                for _ in range(3):
                    assert renewals("free").acquire(timeout=30)
        while renewals("held").acquire(blocking=False):
            pass
        return effect(attempt)

    with Database.open(target, clock=clock, busy_timeout=busy_timeout) as database, ThreadPoolExecutor(1) as pool:
        begun, ended = threading.Event(), threading.Event()

        def free(attempt: Attempt) -> bool:
            begun.set()
            return ended.wait(60) and effect(attempt)

        other = pool.submit(database.run_once, scope_of("free"), free)
        assert begun.wait(30)
        try:
            assert database.run_once(scope_of("held"), held).value is True
        finally:
            ended.set()
        assert other.result(30).value is True


def test_a_forked_child_has_no_thread(target: str, children: Children) -> None:
    """If an effect forks, the child has no renewal thread, even if another thread held the timer at the fork."""
    assert children.run(FORK, target) == "0"


FORK = """
import os, signal, sys, threading
from homeagent import Database, IdempotencyScope
from homeagent.errors import DatabaseClosedError, IdempotencyInProgressError

class Leaves(Exception):
    pass

def effect(attempt):
    held, done = threading.Event(), threading.Event()
    def hold():
        with database._lease_timer._changed:
            held.set()
            done.wait(30)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that hangs is killed, and shows in its status
        raise Leaves
    done.set()
    holder.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

database = Database.open(sys.argv[1])
try:
    print(database.run_once(IdempotencyScope("lamp", "m", "k"), effect).value)
except Leaves:
    code = len(threading.enumerate()) - 1
    try:
        database.run_once(IdempotencyScope("lamp", "m", "k-2"), lambda attempt: 1)
        code += 10
    except DatabaseClosedError:
        pass
    database.close()
    os._exit(code)
database.close()
"""
