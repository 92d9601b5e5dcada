"""Let waiting write units share a transaction. The disk sync of a commit takes longer than a unit's statements.

Ctrl-C can't interrupt a batch, because the writer thread handles no signals. The states of a call in the queue:

| from | to | when |
|---|---|---|
| QUEUED | STARTING | the call is the first of a batch, and the writer thread waits for the write lock |
| QUEUED, STARTING | RUNNING | the writer thread calls the function |
| RUNNING | ENDED | the function has returned or raised, and the batch is not committed yet |
| ENDED | COMMITTING | the writer thread begins the commit, and the caller can no longer leave |
| COMMITTING | DONE | the batch is committed, and the call has the outcome |
| RUNNING, ENDED, COMMITTING | ALONE | the batch was rolled back, so the caller must run the unit itself |
| QUEUED | ALONE | the writer thread cannot be started, so the caller must run the unit itself |
| QUEUED, STARTING | DONE | `busy_timeout` is over or the database was closed, so the caller gets the error |
| QUEUED, STARTING | LEFT | the caller was cancelled or interrupted |
| QUEUED | LEFT | `busy_timeout` is over before the function was called |
| ENDED | LEFT | `busy_timeout` is over before the commit, and the batch is rolled back |
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from homeagent.clock import monotonic
from homeagent.pool import closed_error
from homeagent.transaction import NEW, OPEN, UnitSettings, call_back, refuse_nesting
from homeagent.unit_of_work import UnitOfWork
from homeagent.worker_threads import AwaitedCall, CollectedCalls, call_in_thread, wake

T = TypeVar("T")

# Limits of a batch, during which other units wait for the write lock.
_MAX_BATCH_UNITS = 256
_MAX_BATCH_SECONDS = 0.03
_MIN_CHECK_INTERVAL = 0.005
"""Shortest time between two checks of a call's timeout, in seconds."""
_IDLE = 5.0
"""The writer thread ends after this number of seconds without a call."""

logger: logging.Logger = logging.getLogger("homeagent")


class CallState(Enum):
    """State of a call (see the module's docstring)."""

    QUEUED = auto()
    STARTING = auto()
    RUNNING = auto()
    ENDED = auto()
    COMMITTING = auto()
    DONE = auto()
    ALONE = auto()
    LEFT = auto()

    def __init__(self, _: int) -> None:
        self.is_over: bool = self.name in ("DONE", "ALONE", "LEFT")
        """True if the caller must stop waiting for the call."""


# Python reads a global name ten times faster than `CallState.QUEUED`.
QUEUED, STARTING, RUNNING, ENDED, COMMITTING, DONE, ALONE, LEFT = CallState


@dataclass(slots=True, eq=False)
class QueuedCall(AwaitedCall):
    """A function that the writer thread runs as a unit."""

    woken: threading.Lock = field(default_factory=threading.Lock)
    """Lock that wakes the waiting thread. An interrupt could leave the lock of a `threading.Event` held."""
    caller: int = field(default_factory=get_ident)
    state: CallState = QUEUED
    since: float = field(default_factory=monotonic)
    callbacks: list[Callable[[], object]] | None = None

    def __str__(self) -> str:
        work: Any = self.work
        while isinstance(work, partial):
            work = work.func
        name = getattr(work, "__qualname__", type(work).__qualname__)
        if self.future is not None:
            return f"{name} for a coroutine"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return f"{name} for thread {names.get(self.caller, self.caller)!r}"


class _NotSharedError(BaseException):
    """A caller has stopped waiting, or SQLite has rolled back the batch."""


class GroupCommit:
    """Runs functions as write units of one database. The units of waiting callers share a commit."""

    def __init__(self, settings: UnitSettings, executor: Callable[[], Executor]) -> None:
        self._settings = settings
        self._executor = executor
        # The mutex protects the states of the calls. Do not call a function while a caller's thread holds the mutex.
        # After a call, Python can run a signal handler that writes. The handler and the writer thread would wait for
        # each other (`test_a_handler_that_writes_during_a_call`). The mutex is reentrant, because a signal handler can
        # interrupt `close()`.
        self._mutex = threading.RLock()
        self._queue: SimpleQueue[QueuedCall] = SimpleQueue()
        self._collected = CollectedCalls(self._submit)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, set[QueuedCall]] = WeakKeyDictionary()
        self._batch: list[QueuedCall] = []
        self._is_contended = False
        self._thread: threading.Thread | None = None
        self._is_closed = False
        settings.engine.writers.occupation = self._occupation

    # Callers

    def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run a function as a unit, and return the function's value."""
        settings = self._settings
        # A queued call can share a commit with the calls of other threads.
        if settings.writing or self._is_contended or not self._queue.empty():
            settings.engine.pool(read_only=False)  # in a forked child, the method pool() raises DatabaseClosedError
            if (unit := settings.writing.get(get_ident())) is not None:
                refuse_nesting(unit)
            call = QueuedCall(work)
            call.woken.acquire()
            try:
                self._submit([call])
                wait = max(settings.timeout, _MIN_CHECK_INTERVAL)
                while not call.state.is_over and not call.woken.acquire(timeout=wait):
                    wait = self._check(call)
            except BaseException:
                # `_leave()` has no effect on a unit that the writer thread has begun.
                self._leave(call)
                raise
            if call.state is not ALONE:
                call_back(call.callbacks or ())
                value: T = call.outcome()
                return value
        return self._run_alone(work)

    def _run_alone(self, work: Callable[[UnitOfWork], T]) -> T:
        """In the current thread, run a function as a separate unit."""
        with self._settings.unit(self._settings, read_only=False) as unit:
            # Do not return inside the block, because `test_an_interrupt_anywhere_in_a_call_holds_nobody_up` would fail.
            value = work(unit)
        return value

    async def arun(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run a function as a unit in the writer thread. If the unit has begun, a cancelled caller waits until the unit
        ends.
        """
        self._settings.engine.pool(read_only=False)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        call = QueuedCall(work, future)
        calls = self._loops.get(loop)
        if calls is None:
            calls = self._loops[loop] = set()
            loop.call_later(max(self._settings.timeout, _MIN_CHECK_INTERVAL), self._check_loop, loop, calls)
        calls.add(call)
        cancellation: asyncio.CancelledError | None = None
        try:
            self._collected.add(loop, call)
            await future
        except BaseException as error:
            if self._leave(call) or not isinstance(error, asyncio.CancelledError):
                raise
            cancellation = error if call.state.is_over else await call.wait_shielded(error)
        finally:
            calls.discard(call)
        if call.state is ALONE and cancellation is None:
            return await call_in_thread(partial(self._run_alone, work), self._executor())
        if call.callbacks:
            # A callback can block the event loop, so use another thread.
            await call_in_thread(partial(call_back, call.callbacks), self._executor(), must_run=True)
        if cancellation is not None:
            raise cancellation
        value: T = call.outcome()
        return value

    def _check_loop(self, loop: asyncio.AbstractEventLoop, calls: set[QueuedCall]) -> None:
        """Repeatedly check the timeouts of an event loop's calls."""
        wait = min(map(self._check, calls), default=0)
        # Wake each caller whose call has ended. The method `_deliver()` also wakes callers, but can fail.
        wake(call for call in calls if call.state.is_over)
        if calls:
            loop.call_later(wait, self._check_loop, loop, calls)
        else:
            self._loops.pop(loop, None)

    def _check(self, call: QueuedCall) -> float:
        """If the call has timed out, set the state LEFT. Return the time until the next check, in seconds."""
        remaining = timeout = self._settings.timeout
        now = monotonic()
        with self._mutex:
            # Without a running batch, the writer thread soon takes a queued call.
            if call.state is ENDED or (call.state is QUEUED and self._batch):
                remaining = call.since + timeout - now
                if remaining <= 0:
                    call.state, call.callbacks = LEFT, None
        if call.state is LEFT:
            call.error = error = self._settings.engine.writers.busy(timeout)
            self._settings.engine.counters.waited(monotonic() - call.since)
            self._settings.engine.counters.faulted(error)
        return max(remaining, _MIN_CHECK_INTERVAL)

    def _leave(self, call: QueuedCall) -> bool:
        """If the call has not begun, set the state LEFT, and return True. Otherwise return False."""
        with self._mutex:
            if call.state is QUEUED or call.state is STARTING:
                call.state = LEFT
            return call.state is LEFT

    def _submit(self, calls: list[QueuedCall]) -> None:
        """Queue calls for the writer thread. If the thread can't be started, each caller must run its unit itself."""
        if self._is_closed:
            self._refuse(calls)
            return
        for call in calls:
            # If AnyIO has cancelled the caller, the future of the call is done. Skip the call.
            if call.future is None or not call.future.done():
                self._queue.put(call)
        # Read `_thread` only after `put()`. Otherwise the writer thread could end between the read and `put()`.
        with self._mutex:
            thread = self._thread
        if thread is not None:
            return
        try:
            threading.Thread(target=self._write, name="homeagent-writer", daemon=True).start()
        except (RuntimeError, MemoryError):  # the system has no thread left
            self._deliver(self._move(list(iter(self._next, None)), ALONE))

    def _refuse(self, calls: list[QueuedCall]) -> None:
        """End the calls with DatabaseClosedError, and wake the callers. Skip calls that are over."""
        for call in calls:
            call.error = closed_error()
        self._deliver(self._move(calls, DONE))

    def close(self) -> None:
        """End the queued calls, and wait for the writer thread. Close the connection pools before the call."""
        with self._mutex:
            self._is_closed = True
            thread, timeout = self._thread, self._settings.timeout
        self._refuse(list(iter(self._next, None)))
        self._queue.put(QueuedCall(lambda unit: None, state=LEFT))  # the empty call only wakes the writer thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning(
                "a unit of work did not end within %.3f s after the database was closed: check why its function hangs",
                timeout,
                extra={"event": "unit_hangs", "waited_seconds": timeout},
            )

    # The writer thread

    def _write(self) -> None:
        """Run batches until the database is closed or the queue stays empty."""
        thread = threading.current_thread()
        with self._mutex:
            # If two callers start a thread, the second thread ends at once.
            if self._thread is None:
                self._thread = thread
        while self._thread is thread:
            try:
                first = self._queue.get(timeout=0 if self._is_closed else _IDLE)
            except Empty:
                with self._mutex:
                    if self._queue.empty():
                        self._thread = None
                continue
            self._batch = [first]
            try:
                self._run_batch(first)
            except BaseException as error:  # noqa: BLE001  the callers rely on this thread
                _log(error)
                for call in self._batch:
                    if not call.state.is_over:
                        call.error = error
                self._deliver(self._move(self._batch, DONE))
            self._is_contended = len(self._batch) > 1
            self._batch = []

    def _run_batch(self, first: QueuedCall) -> None:
        timeout = max(first.since + self._settings.timeout - monotonic(), 0)
        if not self._move([first], STARTING):
            return
        shared: list[QueuedCall] = []
        transaction = UnitOfWork(self._settings, read_only=False, timeout=timeout)
        alone: list[QueuedCall] = []
        try:
            with transaction:
                self._run_units(first, transaction, shared)
                # If a caller got a timeout error, do not commit the batch.
                if len(self._move(shared, COMMITTING)) < len(shared):
                    raise _NotSharedError
                if all(call.error is not None for call in shared):
                    transaction.rollback()
        except BaseException as error:  # noqa: BLE001  each unit that runs alone raises its own error
            if transaction._state is NEW:  # the unit did not get the write lock
                first.error, shared = error, [first]
            else:
                shared, alone = [], shared
        # UnitOfWork has already counted one commit or rollback for the batch.
        counters, kept = self._settings.engine.counters, sum(call.error is None for call in shared)
        counters.commits += max(kept - 1, 0)
        counters.rollbacks += len(shared) - max(kept, 1)
        if kept > 1:
            counters.grouped(kept)
        self._deliver(self._move(shared, DONE) + self._move(alone, ALONE))

    def _run_units(self, first: QueuedCall, transaction: UnitOfWork, shared: list[QueuedCall]) -> None:
        """Run queued units in savepoints, up to the limits of a batch. Append each call to the list named `shared`."""
        settings = self._settings
        connection = transaction._require_connection()
        now = monotonic()
        # The first caller waits until the whole batch ends. After a quarter of the timeout, start no further unit.
        end = now + min(_MAX_BATCH_SECONDS, settings.timeout / 4)
        call: QueuedCall | None = first
        while call is not None:
            waited = max(now - call.since, 0)
            with self._mutex:
                is_waiting = not call.state.is_over
                if is_waiting:
                    call.since, call.state = now, RUNNING
            if is_waiting:
                if call is not first:
                    self._batch.append(call)
                    settings.engine.counters.waited(waited)
                shared.append(call)
                unit = settings.unit(settings, read_only=False, joined=connection)
                try:
                    call.value = call.context.run(call.work, unit)
                    if unit._session is not None and unit._state is OPEN:
                        unit._session.complete()
                except BaseException as error:  # noqa: BLE001  `outcome` raises the error in the caller
                    call.error = error
                call.callbacks = unit._leave(keep=call.error is None)
                now = monotonic()
                call.since, call.state = now, ENDED
                if not connection.in_transaction:
                    # On a full disk, SQLite can roll back the whole transaction
                    # (https://sqlite.org/lang_transaction.html, section 3).
                    raise _NotSharedError
            is_full = len(self._batch) >= _MAX_BATCH_UNITS or now >= end
            call = None if is_full else self._next()

    def _next(self) -> QueuedCall | None:
        """Remove and return the oldest call of the queue, or None."""
        try:
            return self._queue.get_nowait()
        except Empty:
            return None

    def _move(self, calls: list[QueuedCall], state: CallState) -> list[QueuedCall]:
        """Set the state of each call that is not over. Return the changed calls."""
        now = monotonic()
        moved = []
        with self._mutex:
            for call in calls:
                if not call.state.is_over:
                    if state is ALONE:
                        call.error = call.callbacks = None
                    call.since, call.state = now, state
                    moved.append(call)
        return moved

    def _deliver(self, calls: list[QueuedCall]) -> None:
        """Wake the callers. Notify each event loop only once."""
        loops: dict[asyncio.AbstractEventLoop, list[QueuedCall]] = {}
        for call in calls:
            if call.future is None:
                call.woken.release()
            else:
                loops.setdefault(call.future.get_loop(), []).append(call)
        for loop, waiting in loops.items():
            try:
                loop.call_soon_threadsafe(wake, waiting)
            except RuntimeError:
                # A closed event loop runs no coroutines.
                self._loops.pop(loop, None)

    def _occupation(self, holder: int) -> str | None:
        """Return a description of the running function, or None."""
        running = next((call for call in reversed(self._batch) if call.state is RUNNING), None)
        return None if running is None else f"{running} since {monotonic() - running.since:.3f} s"


def _log(error: BaseException) -> None:
    """Log an error from outside of units of work, with the traceback."""
    logger.error(
        "the writer thread continues after an error outside of units; see the traceback",
        exc_info=error,
        extra={"event": "writer_failed", "error": type(error).__name__},
    )
