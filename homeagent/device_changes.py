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


class _Subscription:
    """Queue of device changes for one iterator. The thread of a `DeviceWatcher` fills the queue.
    `subscription.position` is the number of the last change that was read.
    """

    def __init__(self, after: int) -> None:
        self._changes: deque[DeviceChange] = deque()
        self._wake: Callable[[], object] | None = None
        self.position: int = after
        self.is_behind: bool = True
        """True if the feed can have further changes for this iterator."""
        self.is_closed: bool = False

    @property
    def has_room(self) -> bool:
        return len(self._changes) < _WAITING

    def take(self, wake: Callable[[], object]) -> DeviceChange | None:
        """Return the next change, or None if the queue is empty. After the next change, the thread calls `wake()`."""
        # Set `_wake` before reading the queue. Otherwise the iterator could miss a change.
        self._wake = wake
        return self._changes.popleft() if self._changes else None

    def put(self, changes: list[DeviceChange]) -> None:
        self._changes.extend(changes)
        self.is_behind = len(changes) == _PAGE
        if changes:
            self.position = changes[-1].number
            self.wake()

    def wake(self) -> None:
        """Wake the iterator. If the event loop of the iterator has ended, close the subscription."""
        wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # asyncio and trio raise RuntimeError after the end of the event loop
                self.is_closed = True


class DeviceChanges(AsyncIterator["DeviceChange"]):
    """Asynchronous iterator of device changes, for one task at a time. A cancelled wait loses no change."""

    def __init__(self, watcher: DeviceWatcher, after: int) -> None:
        self._watcher = watcher
        self._subscription = _Subscription(after)

    def __aiter__(self) -> DeviceChanges:
        return self

    async def __anext__(self) -> DeviceChange:
        subscription = self._subscription
        if not subscription.is_closed:
            self._watcher.serve(subscription)
            await checkpoint()
        while not subscription.is_closed:
            self._watcher.serve(subscription)
            event = anyio.Event()
            change = subscription.take(partial(_caller_in_loop(), event.set))
            if change is not None:
                return change
            with anyio.move_on_after(self._watcher.seconds_left(subscription)):
                await event.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration. A waiting task gets StopAsyncIteration."""
        self._subscription.is_closed = True
        self._subscription.wake()
        self._watcher.wake()

    def __del__(self) -> None:
        # Do not take a mutex, because the garbage collector can interrupt the holder.
        self._subscription.is_closed = True


def _caller_in_loop() -> Callable[[Callable[[], object]], object]:
    """Return a function that schedules calls in this task's event loop. Any thread can call the function."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio  # Import Trio lazily, because an application can lack Trio.

        return trio.lowlevel.current_trio_token().run_sync_soon


class DeviceWatcher:
    """Thread that reads the change feed of a `Database`. The method `close()` waits at most `timeout=` seconds."""

    def __init__(self, engine: Engine, *, timeout: float, monotonic: Callable[[], float] = monotonic) -> None:
        self._engine = engine
        self._timeout = timeout
        self._monotonic = monotonic
        self._mutex = threading.RLock()
        self._subscriptions: set[_Subscription] = set()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._read_at = 0.0
        self._error: Exception | None = None
        # SimpleQueue is reentrant: a signal handler can call `put()` during another `put()`.
        self._wakes: SimpleQueue[None] = SimpleQueue()

    # The iterators

    def serve(self, subscription: _Subscription) -> None:
        """Add a subscription, and start the thread. If the database is closed, raise DatabaseClosedError."""
        # Check for a fork before taking the mutex. A forked child's mutex can stay locked.
        if self._engine.is_forked_copy or self._is_closed:
            raise DatabaseClosedError(_CLOSED)
        if subscription not in self._subscriptions:
            with self._mutex:
                self._subscriptions.add(subscription)
                if self._thread is None:
                    self._start()
            self.wake()
        elif subscription.is_behind and subscription.has_room and self._error is None:
            self.wake()

    def _start(self) -> None:
        self._read_at, self._error = self._monotonic(), None
        self._thread = threading.Thread(target=self._run, name="homeagent-device-changes", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            raise DatabaseError(f"could not start the thread that reads device changes: {error}") from None

    def seconds_left(self, subscription: _Subscription) -> float:
        """Return an iterator's remaining wait in seconds. After `PATIENCE` seconds without a read, raise an error."""
        waited = self._monotonic() - self._read_at
        if waited < PATIENCE:
            return PATIENCE - waited
        subscription.is_closed = True
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
            thread, subscriptions = self._thread, list(self._subscriptions)
        for subscription in subscriptions:
            subscription.wake()
        if thread is not None and thread is not threading.current_thread():
            self.wake()
            thread.join(self._timeout)

    # The thread

    def _run(self) -> None:
        """Read the change feed until `close()`, or until no subscription is open."""
        while True:
            with self._mutex:
                self._subscriptions = {each for each in self._subscriptions if not each.is_closed}
                if self._is_closed or not self._subscriptions:
                    self._thread = None
                    self._engine.feed_connections.discard_free()
                    return
                subscriptions = list(self._subscriptions)
            self._read(subscriptions)
            with suppress(Empty):
                # After a failed read, use a shorter interval, because changes already wait.
                self._wakes.get(timeout=_INTERVAL if self._error is None else _INTERVAL / 4)
                while True:
                    self._wakes.get_nowait()

    def _read(self, subscriptions: Iterable[_Subscription]) -> None:
        """Deliver new changes to the subscriptions. If the read fails, store the error."""
        engine = self._engine
        try:
            with engine.feed_mutex:
                connection = engine.feed_connections.acquire(0)
                try:
                    is_changed = connection.look_for_commits()
                    self._deliver(connection, [each for each in subscriptions if is_changed or each.is_behind])
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
            self._error = error
            for subscription in subscriptions:
                subscription.wake()
            return
        self._read_at, self._error = self._monotonic(), None

    @staticmethod
    def _deliver(connection: StoreConnection, subscriptions: list[_Subscription]) -> None:
        """Fill the queue of each iterator up to the newest change. Stop at a full queue."""
        for subscription in subscriptions:
            subscription.is_behind = True
        while True:
            readers: dict[int, list[_Subscription]] = {}
            for subscription in subscriptions:
                if subscription.is_behind and subscription.has_room and not subscription.is_closed:
                    readers.setdefault(subscription.position, []).append(subscription)
            if not readers:
                return
            for position, group in readers.items():
                rows = connection.read_alone(CHANGES, {"after": position, "limit": _PAGE + 1})
                changes = changes_of(rows, position)
                for subscription in group:
                    subscription.put(changes)
