"""Calls of an event loop are collected, and are handed over to another thread together. SQLite only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from homeagent import Database, DevicePair, Role, UnitOfWork, worker_threads
from homeagent.errors import DatabaseClosedError
from homeagent.group_commit import QueuedCall
from homeagent.worker_threads import CollectedCalls
from tests.batches import group_commit_of


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs one turn at a time."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def turn(loop: asyncio.AbstractEventLoop, *acts: Callable[[], object]) -> None:
    for act in acts:
        loop.call_soon(act)
    loop.call_soon(loop.stop)
    loop.run_forever()


@pytest.mark.parametrize(("most", "time", "turns"), [(5, 0.0, 3), (256, 0.05, 2)], ids=["number", "time"])
def test_a_busy_event_loop_does_not_delay_calls(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, most: int, time: float, turns: int
) -> None:
    """If each turn adds calls, the number of collected calls and the time of the collection are limited."""
    now = 0.0
    monkeypatch.setattr(worker_threads, "monotonic", lambda: now)
    monkeypatch.setattr(worker_threads, "_MAX_CALLS", most)
    handed: list[list[int]] = []
    calls = CollectedCalls(handed.append)
    for number in range(5):
        turn(loop, *(lambda call=call: calls.add(loop, call) for call in (2 * number, 2 * number + 1)))
        now += time
    assert handed[0] == list(range(2 * turns))


def test_a_closed_event_loop_keeps_its_calls(loop: asyncio.AbstractEventLoop, sqlite_database: Database) -> None:
    """If an event loop is closed before the calls are handed over, the units of other event loops still run."""
    ran: list[str] = []
    lost = sqlite_database.arun(lambda unit: ran.append("lost"))
    loop.create_task(lost)
    turn(loop)
    loop.close()
    asyncio.run(sqlite_database.arun(lambda unit: ran.append("kept")))
    assert ran == ["kept"]


@pytest.mark.parametrize("most", [2, 256], ids=["full", "not full"])
@pytest.mark.parametrize("cancel", ["Task.cancel", "scope", "scope before the call"])
def test_a_call_that_is_cancelled_before_it_is_handed_over_does_not_run(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, cancel: str, most: int
) -> None:
    """The function of a cancelled caller does not run, even if the writer thread runs before the caller, or if one turn
    adds the maximum number of calls.
    """
    monkeypatch.setattr(worker_threads, "_MAX_CALLS", most)
    group = group_commit_of(sqlite_database)
    ran: list[str] = []

    def hand_over(calls: list[QueuedCall]) -> None:
        group._submit(calls)
        while group._batch or not group._queue.empty():
            threading.Event().wait(0.001)

    async def cancelled(scope: anyio.CancelScope) -> None:
        with scope:
            if cancel == "scope before the call":
                scope.cancel()
            await sqlite_database.arun(lambda unit: ran.append("cancelled"))

    async def main() -> None:
        scope = anyio.CancelScope()
        first = asyncio.ensure_future(sqlite_database.arun(lambda unit: ran.append("first")))
        call = asyncio.ensure_future(cancelled(scope))
        await asyncio.sleep(0)
        if cancel == "Task.cancel":
            call.cancel()
        else:
            scope.cancel()
        await asyncio.gather(first, call, return_exceptions=True)
        await sqlite_database.arun(lambda unit: ran.append("next"))

    monkeypatch.setattr(group._collected, "_hand_over", hand_over)
    asyncio.run(main())
    assert ran == ["first", "next"]


def test_a_database_that_is_closed_before_the_calls_are_handed_over(sqlite_database: Database) -> None:
    """The callers of a unit and of a check get DatabaseClosedError, and the unit does not run."""
    secret = sqlite_database.pair(DevicePair(id="d1", role=Role.NODE)).shared_secret
    ran: list[UnitOfWork] = []

    async def main() -> list[Any]:
        calls: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(sqlite_database.arun(ran.append)),
            asyncio.ensure_future(sqlite_database.acheck_secret("d1", secret)),
        ]
        await asyncio.sleep(0)
        sqlite_database.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    assert list(map(type, asyncio.run(main()))) == [DatabaseClosedError] * 2
    assert ran == []


def test_checks_of_concurrent_callers_share_a_job_of_a_thread(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks of one turn need one job of an executor. A wrong secret does not affect the other checks."""
    secret = sqlite_database.pair(DevicePair(id="d1", role=Role.NODE)).shared_secret
    jobs: list[Any] = []
    submit = ThreadPoolExecutor.submit

    def counted(executor: ThreadPoolExecutor, *job: Any) -> Any:
        jobs.append(job)
        return submit(executor, *job)

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(sqlite_database.acheck_secret(device_id, secret) for device_id in ("d1", "d2", "d1", "x" * 999))
        )

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    assert [checked.status for checked in asyncio.run(main())] == ["pending", "denied", "pending", "denied"]
    assert len(jobs) == 1
