"""For a coroutine, call a function in another thread. An event loop hands several calls to a thread together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import anyio

from homeagent.clock import monotonic
from homeagent.errors import DatabaseError

C = TypeVar("C")
T = TypeVar("T")

# Limits of a collection. A busy event loop could otherwise add calls without end.
_MAX_CALLS = 256
_MAX_SECONDS = 0.1

# After `_MAX_SHARED_SECONDS`, a thread wakes each caller whose call has ended. If a single call takes
# `_MAX_SHARED_SECONDS`, each remaining call gets a separate thread.
_MAX_SHARED_SECONDS = 0.1


class CollectedCalls(Generic[C]):
    """Collects calls in the event loop, and passes the calls together to `hand_over()`. The collection ends after a
    turn of the event loop without a new call.

    Several calls share one switch to another thread. A switch takes longer than an SQL statement.
    """

    def __init__(self, hand_over: Callable[[list[C]], None]) -> None:
        self._hand_over = hand_over
        self._calls: WeakKeyDictionary[asyncio.AbstractEventLoop, list[C]] = WeakKeyDictionary()

    def add(self, loop: asyncio.AbstractEventLoop, call: C) -> None:
        """Collect a call. The event loop later passes the call to the function `hand_over()`."""
        calls = self._calls.get(loop)
        if calls is None:
            self._calls[loop] = [call]
            loop.call_soon(self._end_turn, loop, 1, monotonic() + _MAX_SECONDS)
        else:
            calls.append(call)

    def _end_turn(self, loop: asyncio.AbstractEventLoop, known: int, end: float) -> None:
        """If the last turn added no call, hand over the calls. If a limit is reached, also hand over the calls."""
        calls = self._calls[loop]
        if known < len(calls) < _MAX_CALLS and monotonic() < end:
            loop.call_soon(self._end_turn, loop, len(calls), end)
            return
        del self._calls[loop]
        if known < len(calls):
            # Call `hand_over()` in the next turn of the event loop. AnyIO needs one turn to cancel a caller
            # (`test_a_call_that_is_cancelled_before_it_is_handed_over_does_not_run`).
            loop.call_soon(self._hand_over, calls)
        else:
            self._hand_over(calls)


@dataclass(slots=True, eq=False)
class AwaitedCall:
    """A function that another thread calls, and the outcome of the function."""

    work: Callable[..., Any]
    future: asyncio.Future[None] | None = None
    """Future that wakes the waiting coroutine, or None if a thread waits."""
    context: Context = field(default_factory=copy_context)
    value: Any = None
    error: BaseException | None = None

    def attempt(self) -> None:
        """Call the function, and keep its value or its error."""
        try:
            self.value = self.context.run(self.work)
        except BaseException as error:  # noqa: BLE001  `outcome()` raises the error
            self.error = error

    def outcome(self) -> Any:
        """Return the value that the function returned, or raise the function's error."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                # Break the reference cycle of the error, its traceback and the call.
                self.error = None
        return self.value

    async def wait_shielded(self, cancellation: asyncio.CancelledError) -> asyncio.CancelledError:
        """After a cancellation of the caller, wait until the call ends. Return the caller's last cancellation."""
        # The cancellation ended the future of the call. Wait for a new future, which `wake()` will end.
        self.future = future = asyncio.get_running_loop().create_future()
        # The cancel scope protects only from a cancellation by AnyIO. The `while` loop protects from `Task.cancel()`,
        # which `asyncio.timeout()` calls.
        with anyio.CancelScope(shield=True):
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError as error:
                    cancellation = error
        return cancellation


def wake(calls: Iterable[AwaitedCall]) -> None:
    """Wake the coroutines that wait for the calls. Call this function only in the thread of the event loop."""
    for call in calls:
        if call.future is not None and not call.future.done():
            call.future.set_result(None)


@dataclass(slots=True, eq=False)
class ThreadCall(AwaitedCall):
    """A function that a worker thread calls for a coroutine."""

    decision: threading.Lock = field(default_factory=threading.Lock)
    """Lock for a worker thread or a cancelled caller. The function runs only if the thread gets the lock."""
    is_over: bool = False


def run_in_thread(executor: Executor, calls: list[ThreadCall]) -> None:
    """Run the calls of an event loop in one thread. Call this function only in the thread of the event loop."""
    try:
        executor.submit(_run, executor, asyncio.get_running_loop(), calls)
    # The method `submit()` can queue the calls and then raise an error. Another thread can still run the queued calls.
    except (RuntimeError, MemoryError) as error:
        failure = DatabaseError(
            f"could not pass the call to a worker thread: {error!r}. If the system has no thread left, end other "
            "threads or raise the system's limit"
        )
        ended = [call for call in calls if call.decision.acquire(blocking=False)]
        for call in ended:
            call.error, call.is_over = failure, True
        wake(ended)


def _run(executor: Executor, loop: asyncio.AbstractEventLoop, calls: list[ThreadCall]) -> None:
    ended: list[ThreadCall] = []
    now = monotonic()
    end = now + _MAX_SHARED_SECONDS
    for place, call in enumerate(calls, 1):
        if call.decision.acquire(blocking=False):
            # Do not inline `attempt()`, because `clear_locals()` can't clear a running frame.
            call.attempt()
            call.is_over = True
            ended.append(call)
            begun, now = now, monotonic()
            if now - begun >= _MAX_SHARED_SECONDS:
                # The remaining calls must not wait for another slow call.
                for waiting in calls[place:]:
                    loop.call_soon_threadsafe(run_in_thread, executor, [waiting])
                break
            if now >= end:
                loop.call_soon_threadsafe(wake, ended)
                ended, end = [], now + _MAX_SHARED_SECONDS
    if ended:
        loop.call_soon_threadsafe(wake, ended)


async def call_in_thread(
    act: Callable[[], T], threads: Executor | CollectedCalls[ThreadCall], *, must_run: bool = False
) -> T:
    """Call `act()` in a worker thread, and return the result. A cancelled caller waits until a started call has ended.

    A cancellation before the start prevents the call, except with `must_run=True`. Do not use
    `anyio.to_thread.run_sync()`, which takes longer than a read of a row.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    call = ThreadCall(act, future)
    cancellation: asyncio.CancelledError | None = None
    if isinstance(threads, CollectedCalls):
        threads.add(loop, call)
    else:
        run_in_thread(threads, [call])
    try:
        await future
    except asyncio.CancelledError as error:
        if not must_run and call.decision.acquire(blocking=False):
            raise
        cancellation = error if call.is_over else await call.wait_shielded(error)
    if cancellation is not None:
        raise cancellation
    result: T = call.outcome()
    return result
