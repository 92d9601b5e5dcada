"""Group commit: write units that wait for the one write lock share a transaction and its commit.

A commit that is synced to the disk takes many times as long as a small unit. The writer thread, one per database, takes
the calls that wait, runs each in a savepoint of its own, and commits once for the whole batch. A caller that has no
other caller before it runs its unit in its own thread, in a plain transaction. No caller's thread runs the function of
another caller. Signals never reach the writer thread, so the state of a batch needs no defence against interrupts.

A call is in one of these states. A caller moves its call to LEFT only; the writer thread makes the other moves.

| from | to | when |
|---|---|---|
| QUEUED | STARTING | the call is the first of a batch: the writer thread waits for the write lock |
| QUEUED, STARTING | RUNNING | the function runs |
| RUNNING | ENDED | the function returned or raised; the common commit is still to come |
| ENDED | COMMITTING | the batch is about to be committed: no caller can leave any more |
| COMMITTING | DONE | the batch is committed: the outcome is in the call |
| RUNNING, ENDED, COMMITTING | ALONE | the batch was rolled back or its commit failed: the caller runs its unit itself |
| ENDED, QUEUED | ALONE | so too if the function asked for the ORM session, or if the system has no thread left |
| QUEUED, STARTING | DONE | the write lock cannot be had, or the database was closed: the error is in the call |
| QUEUED, STARTING | LEFT | the caller was cancelled or interrupted |
| QUEUED, ENDED | LEFT | the caller waited for `busy_timeout`; a batch that an ENDED call leaves is rolled back |
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from homeagent.cancellation import call_in_thread, shielded_wait
from homeagent.clock import monotonic
from homeagent.errors import DatabaseClosedError, DatabaseError
from homeagent.unit_of_work import UnitOfWork, UnitSettings, call_back, refuse_nesting

if TYPE_CHECKING:
    from sqlmodel import Session

    from homeagent.engine.connection import StoreConnection

__all__ = ["GroupCommit"]

T = TypeVar("T")

_MOST = 256
_LONGEST = 0.01
"""A batch ends after so many units or seconds, so that blocks that wait for the write lock get their turn."""
_SHORTEST_CHECK = 0.005
"""A caller checks no more often than this whether it has waited for too long, in seconds."""
_IDLE = 5.0
"""The writer thread ends after so many seconds without a call; the next call starts another one."""
_CLOSED = "the database was closed: open it again"
_SAVEPOINT = "homeagent_group"

logger = logging.getLogger("homeagent")

_State = Enum("_State", ["QUEUED", "STARTING", "RUNNING", "ENDED", "COMMITTING", "DONE", "ALONE", "LEFT"])
# `_State.QUEUED` takes ten times as long as a name of the module.
QUEUED, STARTING, RUNNING, ENDED, COMMITTING, DONE, ALONE, LEFT = _State


@dataclass(slots=True, eq=False)
class _Call:
    """A function that the writer thread runs as a unit of work for a caller, and its outcome."""

    work: Callable[[UnitOfWork], Any]
    future: asyncio.Future[None] | None = None
    """Wakes the coroutine that waits; None if a thread waits."""
    woken: threading.Lock = field(default_factory=threading.Lock)
    """Wakes the thread that waits. An interrupt could leave a threading.Event locked, and block the writer thread."""
    context: Context = field(default_factory=copy_context)
    caller: int = field(default_factory=get_ident)
    state: _State = QUEUED
    since: float = field(default_factory=monotonic)
    value: Any = None
    error: BaseException | None = None
    callbacks: list[Callable[[], object]] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the caller is to wait no longer."""
        return self.state is DONE or self.state is ALONE or self.state is LEFT

    def outcome(self) -> Any:
        """Return the value of the function, or raise its error."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # its traceback refers to this call
        return self.value

    def __str__(self) -> str:
        work: Any = self.work
        while isinstance(work, partial):
            work = work.func
        name = getattr(work, "__qualname__", type(work).__qualname__)
        if self.future is not None:
            return f"{name} for a coroutine"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return f"{name} for thread {names.get(self.caller, self.caller)!r}"


class _SharedUnit(UnitOfWork):
    """A unit in a savepoint of a batch's transaction."""

    __slots__ = ("wants_session",)

    def __init__(self, settings: UnitSettings, connection: StoreConnection) -> None:
        super().__init__(settings, read_only=False)
        self.wants_session = False
        connection.savepoint(_SAVEPOINT)
        self._connection = connection
        self._state = "open"

    @property
    def session(self) -> Session:
        """End the function: the ORM session needs a transaction of its own, so the unit runs again alone."""
        self._require_connection()
        self.wants_session = True
        raise _NotSharedError

    def rollback(self) -> None:
        """Abandon the unit: see `UnitOfWork.rollback`."""
        if self._state == "rolled back":
            return
        connection = self._require_connection()
        self._after_commit = None
        connection.rollback_to_savepoint(_SAVEPOINT)
        self._state = "rolled back"

    def end(self, *, keep: bool) -> list[Callable[[], object]] | None:
        """End the unit and its savepoint; return what to call after the commit."""
        connection, self._connection = self._connection, None
        is_open, self._state = self._state == "open", "ended"
        # If SQLite rolled back the whole transaction, the savepoint is gone too.
        if connection is not None and is_open and connection.in_transaction:
            (connection.release_savepoint if keep else connection.rollback_to_savepoint)(_SAVEPOINT)
        return self._after_commit if keep else None


class _NotSharedError(BaseException):
    """A unit cannot share its transaction: it asks for the ORM session, or the transaction was rolled back."""


class GroupCommit:
    """Runs functions as write units of one database; the units of callers that wait share a commit.

    Args:
        settings: what the units of the database share.
    """

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # Guards the states. Reentrant: a signal handler may use the database while its own thread holds it.
        self._mutex = threading.RLock()
        self._queue: SimpleQueue[_Call] = SimpleQueue()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, set[_Call]] = WeakKeyDictionary()
        self._batch: list[_Call] = []
        self._is_crowded = False
        self._thread: threading.Thread | None = None
        self._is_closed = False
        settings.engine.writers.occupation = self._occupation

    # Callers

    def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run a function as a unit, in this thread or in the writer thread, and return its value.

        Raises:
            DatabaseBusyError: the unit's turn or its commit did not come within `busy_timeout`. Nothing took place.
            UnitStateError: this thread has a write unit open.
            DatabaseClosedError: the database was closed, or opened before a fork.
        """
        settings = self._settings
        settings.engine.pool(read_only=False)  # raises in a forked child
        if get_ident() in settings.writing:
            refuse_nesting()
        # After a batch of several units more callers are about to come, and all of them can share a commit.
        if settings.writing or self._is_crowded or not self._queue.empty():
            call = _Call(work)
            call.woken.acquire()
            try:
                self._submit(call)
                patience = max(settings.timeout, _SHORTEST_CHECK)
                while not call.is_over and not call.woken.acquire(timeout=patience):
                    patience = self._check(call)
            except BaseException:
                # An interrupt, for example. If the function has begun, the outcome of the unit stands.
                self._leave(call)
                raise
            if call.state is not ALONE:
                call_back(call.callbacks or ())
                value: T = call.outcome()
                return value
        return self._run_alone(work)

    def _run_alone(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run a function as a unit in this thread, in a transaction of its own."""
        with UnitOfWork(self._settings, read_only=False) as unit:
            # Do not return from here: test_an_interrupt_anywhere_in_a_call_holds_nobody_up
            value = work(unit)
        return value

    async def arun(self, work: Callable[[UnitOfWork], T]) -> T:
        """Run a function as a unit for a coroutine of asyncio, in the writer thread, and return its value.

        A caller that is cancelled before its unit's turn leaves the queue. After that it waits for the unit's end.

        Raises:
            DatabaseBusyError, DatabaseClosedError: as in `run`.
            DatabaseError: no thread can be started. Nothing took place.
        """
        self._settings.engine.pool(read_only=False)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        call = _Call(work, future)
        calls = self._loops.get(loop)
        if calls is None:
            calls = self._loops[loop] = set()
            loop.call_later(max(self._settings.timeout, _SHORTEST_CHECK), self._check_loop, loop, calls)
        calls.add(call)
        cancellation: asyncio.CancelledError | None = None
        try:
            self._submit(call)
            if not call.is_over:
                await future
        except BaseException as error:
            if self._leave(call) or not isinstance(error, asyncio.CancelledError):
                raise
            cancellation = error
            if not call.is_over:
                # The cancellation ended the future. Only this thread resolves one, so no wake-up is missed.
                call.future = loop.create_future()
                cancellation = await shielded_wait(call.future) or error
        finally:
            calls.discard(call)
        if call.state is ALONE and cancellation is None:
            return await call_in_thread(partial(self._run_alone, work))
        if call.callbacks:
            # They may use the database, and must not block the event loop.
            await call_in_thread(partial(call_back, call.callbacks))
        if cancellation is not None:
            raise cancellation
        value: T = call.outcome()
        return value

    def _check_loop(self, loop: asyncio.AbstractEventLoop, calls: set[_Call]) -> None:
        """Check the calls of an event loop, and again for as long as there are any."""
        patience = min(map(self._check, calls), default=0)
        _resolve([call for call in calls if call.is_over])  # among them those that the loop was not notified of
        if calls:
            loop.call_later(patience, self._check_loop, loop, calls)
        else:
            self._loops.pop(loop, None)

    def _check(self, call: _Call) -> float:
        """End the wait of a call that waited for too long, and return in how many seconds to check again.

        Only the time in the queue and the time until the commit counts: a function may run as long as it likes.
        """
        left = timeout = self._settings.timeout
        with self._mutex:
            # If there is no batch, the writer thread is about to take the call.
            if call.state is ENDED or (call.state is QUEUED and self._batch):
                left = call.since + timeout - monotonic()
                if left <= 0:
                    call.state, call.callbacks = LEFT, None
        if call.state is LEFT:
            call.error = error = self._settings.engine.writers.busy(timeout)
            self._settings.engine.counters.waited(monotonic() - call.since)
            self._settings.engine.counters.faulted(error)
        return max(left, _SHORTEST_CHECK)

    def _leave(self, call: _Call) -> bool:
        """Remove a call from the queue. Return False if its function has begun."""
        with self._mutex:
            if call.state is QUEUED or call.state is STARTING:
                call.state = LEFT
            return call.state is LEFT

    def _submit(self, call: _Call) -> None:
        """Queue a call for the writer thread, which is started if there is none."""
        with self._mutex:
            if self._is_closed:
                raise DatabaseClosedError(_CLOSED)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="homeagent-writer", daemon=True)
                try:
                    self._thread.start()
                except BaseException as error:
                    self._thread = None  # a thread that begins in spite of an interrupt ends at once
                    if not isinstance(error, Exception):
                        raise
                    call.error = DatabaseError(f"no thread can be started to write for coroutines: {error!r}")
                    call.state = ALONE if call.future is None else DONE
                    return
            self._queue.put(call)

    def close(self) -> None:
        """Refuse the calls that wait, and wait for the end of the writer thread, for `busy_timeout` at most.

        The connections are closed before. A function that runs meanwhile is committed when it ends, as a block is.
        """
        with self._mutex:
            self._is_closed = True
            while (call := self._next()) is not None:
                call.error = DatabaseClosedError(_CLOSED)
                self._deliver(self._move([call], DONE))
            self._queue.put(_Call(lambda unit: None, state=LEFT))  # only wakes the writer thread
            thread, timeout = self._thread, self._settings.timeout
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning(
                "a unit of work did not end within %.3f s of closing the database: its function hangs",
                timeout,
                extra={"event": "unit_hangs", "waited_seconds": timeout},
            )

    # The writer thread

    def _write(self) -> None:
        """Run batches until the database is closed, or no call has come for a while."""
        while self._thread is threading.current_thread():
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
            except BaseException as error:  # noqa: BLE001  no caller starts another thread in the place of this one
                _log(error)
                for call in self._batch:
                    if not call.is_over:
                        call.error = error
                self._deliver(self._move(self._batch, DONE))
            self._is_crowded = len(self._batch) > 1
            self._batch = []

    def _run_batch(self, first: _Call) -> None:
        """Run units in one transaction, and wake their callers."""
        timeout = max(first.since + self._settings.timeout - monotonic(), 0)
        if not self._move([first], STARTING):
            return
        shared: list[_Call] = []
        alone: list[_Call] = []
        transaction = UnitOfWork(self._settings, read_only=False, timeout=timeout)
        try:
            with transaction:
                self._run_units(first, transaction, shared, alone)
                # A caller that has left was told that nothing of its unit took place.
                if len(self._move(shared, COMMITTING)) < len(shared):
                    raise _NotSharedError
                if all(call.error is not None for call in shared):
                    transaction.rollback()
        except BaseException as error:  # noqa: BLE001  a unit that runs alone has an error of its own
            if transaction._state == "new":  # the write lock could not be had
                first.error, shared = error, [first]
            else:
                shared, alone = [], [*shared, *alone]
        try:
            # The transaction has counted as one commit, or as one rollback.
            counters, kept = self._settings.engine.counters, sum(call.error is None for call in shared)
            counters.commits += max(kept - 1, 0)
            counters.rollbacks += len(shared) - max(kept, 1)
            if kept > 1:
                counters.grouped(kept)
        finally:
            self._deliver(self._move(shared, DONE) + self._move(alone, ALONE))

    def _run_units(self, first: _Call, transaction: UnitOfWork, shared: list[_Call], alone: list[_Call]) -> None:
        """Run units in savepoints until no call is queued or the batch is full."""
        connection = transaction._require_connection()
        # Well within the time that the first callers wait for the commit.
        end = monotonic() + min(_LONGEST, self._settings.timeout / 4)
        call: _Call | None = first
        while call is not None:
            now = monotonic()
            waited = now - call.since
            with self._mutex:
                is_waiting = not call.is_over
                if is_waiting:
                    call.since, call.state = now, RUNNING
            if is_waiting:
                if call is not first:
                    self._batch.append(call)
                    self._settings.engine.counters.waited(waited)
                shared.append(call)
                unit = _SharedUnit(self._settings, connection)
                try:
                    call.value = call.context.run(call.work, unit)
                except BaseException as error:  # noqa: BLE001  raised by the outcome
                    call.error = error
                call.callbacks = unit.end(keep=call.error is None and not unit.wants_session)
                call.since, call.state = monotonic(), ENDED
                if unit.wants_session:
                    alone.append(shared.pop())
                if not connection.in_transaction:
                    # A full disk, for example: https://sqlite.org/lang_transaction.html, section 3
                    raise _NotSharedError
            is_full = len(self._batch) >= _MOST or monotonic() >= end
            call = None if is_full else self._next()

    def _next(self) -> _Call | None:
        """Return the next call of the queue, None if there is none."""
        try:
            return self._queue.get_nowait()
        except Empty:
            return None

    def _move(self, calls: list[_Call], state: _State) -> list[_Call]:
        """Move calls to a state, and return them. Calls that are over stay so, and are left out."""
        now = monotonic()
        with self._mutex:
            moved = [call for call in calls if not call.is_over]
            for call in moved:
                if state is ALONE:
                    call.error = call.callbacks = None
                call.since, call.state = now, state
        return moved

    def _deliver(self, calls: list[_Call]) -> None:
        """Wake callers: each thread, and each event loop once."""
        loops: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
        for call in calls:
            if call.future is None:
                call.woken.release()
            else:
                loops.setdefault(call.future.get_loop(), []).append(call)
        for loop, waiting in loops.items():
            try:
                loop.call_soon_threadsafe(_resolve, waiting)
            except RuntimeError:
                self._loops.pop(loop, None)  # the loop was closed: no caller waits
            except Exception as error:  # noqa: BLE001  no memory, for example: the timers of the calls wake the callers
                _log(error)

    def _occupation(self, holder: int) -> str | None:
        """Say which function the writer thread runs. If there is one, that thread holds the write lock."""
        running = next((call for call in reversed(self._batch) if call.state is RUNNING), None)
        return None if running is None else f"{running} since {monotonic() - running.since:.3f} s"


def _resolve(calls: list[_Call]) -> None:
    """Wake coroutines, in the thread of their event loop."""
    for call in calls:
        if call.future is not None and not call.future.done():
            call.future.set_result(None)


def _log(error: BaseException) -> None:
    logger.error(
        "the writer thread met an error outside of a unit, and goes on",
        exc_info=error,
        extra={"event": "writer_failed", "error": type(error).__name__},
    )
