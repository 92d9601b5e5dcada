"""Coroutines call blocking functions in worker threads."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from homeagent import worker_threads
from homeagent.errors import DatabaseError
from homeagent.worker_threads import CollectedCalls, ThreadCall, call_in_thread, run_in_thread


def test_a_cancelled_call_that_has_not_begun_does_not_run() -> None:
    """If the caller is cancelled, a queued function does not run, and a function that has begun runs to its end."""
    begun, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def block() -> None:
        begun.set()
        assert go_on.wait(30)
        ran.append("first")

    async def work() -> None:
        with ThreadPoolExecutor(1) as executor:
            first = asyncio.ensure_future(call_in_thread(block, executor))
            assert await asyncio.to_thread(begun.wait, 30)
            second = asyncio.ensure_future(call_in_thread(lambda: ran.append("second"), executor))
            await asyncio.sleep(0)
            first.cancel()
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert not first.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert ran == ["first"]

    asyncio.run(work())
    assert ran == ["first"]


def test_a_call_without_a_thread_does_not_run_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the call raises the error, although the executor keeps the call in its queue."""
    ran: list[bool] = []

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        with ThreadPoolExecutor(1) as executor:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", start)
                with pytest.raises(DatabaseError, match="can't start new thread"):
                    await call_in_thread(lambda: ran.append(True), executor)
            assert await call_in_thread(lambda: "next", executor) == "next"

    asyncio.run(work())
    assert ran == []


def test_a_call_after_a_shutdown_names_the_shutdown() -> None:
    """If the executor was shut down, the error names the reason, and does not say that the system lacks threads."""

    async def work() -> None:
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        with pytest.raises(DatabaseError, match=r"after shutdown.*\. If the system has no thread left, end other"):
            await call_in_thread(lambda: None, executor)

    asyncio.run(work())


def test_a_slow_call_does_not_delay_the_calls_that_were_collected_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a slow call, the remaining calls run at the same time: each of two calls waits for the other call."""
    monkeypatch.setattr(worker_threads, "_MAX_SHARED_SECONDS", 0)
    meeting = threading.Barrier(2, timeout=5)

    async def work() -> None:
        with ThreadPoolExecutor(2) as executor:
            calls = CollectedCalls[ThreadCall](lambda collected: run_in_thread(executor, collected))
            acts = (lambda: 7, meeting.wait, meeting.wait)
            first, *others = await asyncio.gather(*(call_in_thread(act, calls) for act in acts))
            assert (first, sorted(others)) == (7, [0, 1])

    asyncio.run(work())
