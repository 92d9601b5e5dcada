"""Deliver device changes to asynchronous iterators (see `Database.watch_devices`).

One thread of each `Database` reads the change feed for all iterators. A lost connection can block the thread. Each
iterator therefore checks the time of the last read (`test_a_server_that_does_not_answer_ends_the_iterator`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING
from weakref import WeakSet

import anyio
from anyio.lowlevel import checkpoint

from homeagent.clock import monotonic
from homeagent.errors import DatabaseClosedError, DatabaseError, HomeAgentError
from homeagent.stores.device_statements import CHANGES, changes_of

if TYPE_CHECKING:
    from homeagent.engine.connection import StoreConnection
    from homeagent.engine.engine import Engine
    from homeagent.models.device_change import DeviceChange

logger: logging.Logger = logging.getLogger("homeagent")

PATIENCE = 5.0
"""Seconds without a successful read after which an iterator raises an error."""

_PAGE = 100  # Maximum number of changes that one statement reads.
_WAITING = 1000  # At this number of changes, the queue of an iterator is full.
_INTERVAL = 0.2  # Seconds between two reads of the change feed.

_CLOSED = "the database was closed, or was opened before the process was forked: open it again"


class DeviceChanges(AsyncIterator["DeviceChange"]):
    """Asynchronous iterator of device changes, for one task at a time. A cancelled wait loses no change.

    The thread of the `DeviceWatcher` fills a queue of each iterator.
    """

    def __init__(self, watcher: DeviceWatcher, after: int) -> None:
        self._watcher = watcher
        self._changes: deque[DeviceChange] = deque()
        self._wake: Callable[[], object] | None = None
        self.position: int = after
        """Number of the last change in the queue."""
        self.is_behind: bool = True
        """True if the feed can have further changes for this iterator."""
        self.is_closed: bool = False

    @property
    def has_room(self) -> bool:
        """True if the queue is not full."""
        return len(self._changes) < _WAITING

    def __aiter__(self) -> DeviceChanges:
        return self

    async def __anext__(self) -> DeviceChange:
        if not self.is_closed:
            self._watcher.serve(self)
            await checkpoint()
        while not self.is_closed:
            self._watcher.serve(self)
            event = anyio.Event()
            # Set `_wake` before reading the queue. Otherwise the iterator could miss a change.
            self._wake = partial(_caller_in_loop(), event.set)
            if self._changes:
                return self._changes.popleft()
            with anyio.move_on_after(self._watcher.seconds_left(self)):
                await event.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration. A waiting task gets StopAsyncIteration."""
        self.is_closed = True
        self.wake()
        self._watcher.wake()

    def put(self, changes: list[DeviceChange]) -> None:
        """Add changes to the queue, and wake the waiting task."""
        self._changes.extend(changes)
        self.is_behind = len(changes) == _PAGE
        if changes:
            self.position = changes[-1].number
            self.wake()

    def wake(self) -> None:
        """Wake the waiting task. If the event loop of the task has ended, close the iterator."""
        wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # asyncio and trio raise RuntimeError after the end of the event loop
                self.is_closed = True


def _caller_in_loop() -> Callable[[Callable[[], object]], object]:
    """Return a function that schedules calls in this task's event loop. Any thread can call the function."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio  # Import Trio lazily, because an application can lack Trio.

        return trio.lowlevel.current_trio_token().run_sync_soon


class DeviceWatcher:
    """Thread that reads the change feed of a `Database`. The method `close()` waits at most `timeout=` seconds."""

    def __init__(self, engine: Engine, *, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._mutex = threading.RLock()
        self._iterators: WeakSet[DeviceChanges] = WeakSet()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._read_at = 0.0
        self._error: Exception | None = None
        # SimpleQueue is reentrant: a signal handler can call `put()` during another `put()`.
        self._wakes: SimpleQueue[None] = SimpleQueue()

    # The iterators

    def serve(self, iterator: DeviceChanges) -> None:
        """Add an iterator, and start the thread. If the thread can't start, raise DatabaseError. If the database is
        closed, raise DatabaseClosedError.
        """
        # Check for a fork before taking the mutex. A forked child's mutex can stay locked.
        if self._engine.is_forked_copy or self._is_closed:
            raise DatabaseClosedError(_CLOSED)
        if iterator not in self._iterators:
            with self._mutex:
                if self._thread is None:
                    self._read_at, self._error = monotonic(), None
                    thread = threading.Thread(target=self._run, name="homeagent-device-changes", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:
                        raise DatabaseError(
                            f"could not start the thread that reads device changes: {error}. If the system has no "
                            "thread left, end other threads or raise the system's limit"
                        ) from None
                    self._thread = thread
                self._iterators.add(iterator)
            self.wake()
        elif iterator.is_behind and iterator.has_room and self._error is None:
            self.wake()

    def seconds_left(self, iterator: DeviceChanges) -> float:
        """Return an iterator's remaining wait in seconds. After `PATIENCE` seconds without a read, raise an error."""
        waited = monotonic() - self._read_at
        if waited < PATIENCE:
            return PATIENCE - waited
        iterator.is_closed = True
        raise DatabaseError(
            f"the changes of devices could not be read for {waited:.1f} s: "
            f"{self._error or 'the database does not answer'}. Check the rights of each connected device again"
        ) from self._error

    def wake(self) -> None:
        """Let the thread read the change feed at once."""
        self._wakes.put(None)

    def close(self) -> None:
        """End the thread. Every iterator then raises DatabaseClosedError."""
        with self._mutex:
            self._is_closed = True
            thread, iterators = self._thread, list(self._iterators)
        for iterator in iterators:
            iterator.wake()
        if thread is not None and thread is not threading.current_thread():
            self.wake()
            thread.join(self._timeout)

    # The thread

    def _run(self) -> None:
        """Read the change feed until `close()`, or until no iterator is open."""
        while True:
            with self._mutex:
                iterators = [each for each in self._iterators if not each.is_closed]
                self._iterators = WeakSet(iterators)
                if self._is_closed or not iterators:
                    self._thread = None
                    self._engine.feed_connections.discard_free()
                    return
            self._read(iterators)
            # Do not keep an iterator alive during the wait. The thread ends after the loss of the last reference.
            del iterators
            with suppress(Empty):
                # After a failed read, use a shorter interval, because changes already wait.
                self._wakes.get(timeout=_INTERVAL if self._error is None else _INTERVAL / 4)
                while True:
                    self._wakes.get_nowait()

    def _read(self, iterators: Iterable[DeviceChanges]) -> None:
        """Deliver new changes to the iterators. If the read fails, store the error."""
        engine = self._engine
        try:
            with engine.feed_mutex:
                connection = engine.feed_connections.acquire(0)
                try:
                    is_changed = connection.look_for_commits()
                    self._deliver(connection, [each for each in iterators if is_changed or each.is_behind])
                except BaseException:
                    engine.feed_connections.discard(connection)
                    raise
                if connection.needs_reconnect:
                    engine.feed_connections.discard(connection)
                else:
                    engine.feed_connections.release(connection)
        except Exception as error:
            if self._error is None and not self._is_closed:
                logger.warning(
                    "the changes of devices can't be read; the iterators raise an error after %g s: %s",
                    PATIENCE,
                    error,
                    exc_info=None if isinstance(error, HomeAgentError) else error,
                    extra={"event": "device_changes_unreadable", "error": type(error).__name__},
                )
            # Without the traceback, because its frames would keep the iterators alive.
            self._error = error.with_traceback(None)
            for iterator in iterators:
                iterator.wake()
            return
        self._read_at, self._error = monotonic(), None

    @staticmethod
    def _deliver(connection: StoreConnection, iterators: list[DeviceChanges]) -> None:
        """Fill the queue of each iterator up to the newest change. Stop at a full queue."""
        for iterator in iterators:
            iterator.is_behind = True
        while True:
            readers: dict[int, list[DeviceChanges]] = {}
            for iterator in iterators:
                if iterator.is_behind and iterator.has_room and not iterator.is_closed:
                    readers.setdefault(iterator.position, []).append(iterator)
            if not readers:
                return
            for position, group in readers.items():
                rows = connection.read_alone(CHANGES, {"after": position, "limit": _PAGE + 1})
                changes = changes_of(rows, position)
                for iterator in group:
                    iterator.put(changes)
