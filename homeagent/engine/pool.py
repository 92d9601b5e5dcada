"""ConnectionPool: who may use a pinned connection next, in the order in which they asked.

A plain lock lets a thread that gives it up take it again at once: a sweeping thread starved the writers for 400 ms
in a trial, and SQLite's own busy handler is no fairer. Here a connection is handed to the one that waits longest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Generic, Protocol, TypeVar

from homeagent.clock import monotonic
from homeagent.errors import DatabaseBusyError, DatabaseClosedError

__all__ = ["ConnectionPool"]


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class _Waiter(Generic[T]):
    __slots__ = ("given", "ident", "resource", "room")

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.given = threading.Lock()
        self.given.acquire()
        self.resource: T | None = None
        self.room = False


class ConnectionPool(Generic[T]):
    """A bounded set of resources, made on demand, kept, and handed out first in, first out.

    Args:
        size: how many there may be at once; 1 makes a lock.
        make: makes one. What it raises reaches the caller, and the place is free again.
        name: what the message of a timeout calls it, such as "write lane".
        waited: is told how long somebody waited, in seconds, whether or not there was a resource at the end of it.
    """

    def __init__(
        self, size: int, make: Callable[[], T], *, name: str, waited: Callable[[float], object] | None = None
    ) -> None:
        self._size = size
        self._make = make
        self._name = name
        self._waited = waited
        # A signal's handler may come while its own thread holds it, and use the database.
        self._mutex = threading.RLock()
        self._free: list[T] = []
        self._waiters: deque[_Waiter[T]] = deque()
        self._count = 0
        self._closed = False
        self._held: dict[T, tuple[int, float]] = {}
        self.occupation: Callable[[int], str | None] | None = None
        """Says what a thread that holds one is doing, where that is not its own affair."""
        self.waits = 0
        """How often a caller had to wait."""

    def acquire(self, timeout: float) -> T:
        """Return a resource that nobody else holds, after at most `timeout` seconds.

        Raises:
            DatabaseBusyError: none was given up in time; the message says who holds them and for how long.
            DatabaseClosedError: the lanes are closed.
        """
        holder = get_ident(), monotonic()
        resource: T | None = None
        waiter: _Waiter[T] | None = None
        has_room = False
        # An interrupt comes right after a call, never between two lines without one: what is taken is noted by then.
        try:
            with self._mutex:
                if self._closed:
                    raise _closed()
                if self._free and not self._waiters:
                    resource = self._free[-1]
                    self._held[resource] = holder
                    del self._free[-1]
                elif self._count < self._size:
                    self._count += 1
                    has_room = True
                else:
                    waiter = _Waiter(holder[0])
                    self._waiters.append(waiter)
            if waiter is not None:
                has_room = self._wait(waiter, timeout)
                resource = waiter.resource
            if has_room:
                holder = holder[0], monotonic()
                made = self._make()
                with self._mutex:
                    self._held[made] = holder
                    resource = made
        except BaseException:
            if resource is not None:
                self.release(resource)
            elif waiter is not None:
                self._withdraw(waiter)
            elif has_room:
                self._give_room()
            raise
        if resource is None:
            raise _closed()
        return resource

    def _wait(self, waiter: _Waiter[T], timeout: float) -> bool:
        """Wait for a resource, and tell whether there is room for one instead."""
        self.waits += 1
        since = monotonic()
        try:
            given = waiter.given.acquire(timeout=max(timeout, 0))
        finally:
            if self._waited is not None:
                self._waited(monotonic() - since)
        if not given:
            with self._mutex:
                # It may have been given between the timeout and here: then it is ours.
                if waiter in self._waiters:
                    raise self._busy(timeout)
        return waiter.room

    def _withdraw(self, waiter: _Waiter[T]) -> None:
        """Leave the queue; what was given in the meantime goes to the next."""
        with self._mutex:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return
        if waiter.resource is not None:
            self.release(waiter.resource)
        elif waiter.room:
            self._give_room()

    def release(self, resource: T) -> None:
        """Give a resource back: to who waits longest, or to the free ones."""
        with self._mutex:
            closed = self._closed
            if closed:
                del self._held[resource]
                self._count -= 1
            elif self._waiters:
                since = monotonic()
                waiter = self._waiters[0]
                del self._waiters[0]
                self._held[resource] = waiter.ident, since
                waiter.resource = resource
                waiter.given.release()
            else:
                del self._held[resource]
                self._free.append(resource)
        if closed:
            resource.close()

    def release_own(self, resource: T) -> None:
        """Give back what this thread may hold still, since an interrupt came when it was about to."""
        holder = self._held.get(resource)
        if holder is not None and holder[0] == get_ident():
            self.release(resource)

    def discard(self, resource: T) -> None:
        """Give a place back whose resource is of no more use, and close that."""
        try:
            resource.close()
        finally:
            self._give_room(resource)

    def discard_free(self) -> None:
        """Close what nobody holds, such as connections to a server that was restarted."""
        with self._mutex:
            free, self._free = self._free, []
            self._count -= len(free)
        for resource in free:
            resource.close()

    def _give_room(self, resource: T | None = None) -> None:
        with self._mutex:
            if resource is not None:
                del self._held[resource]
            if self._waiters and not self._closed:
                waiter = self._waiters[0]
                del self._waiters[0]
                waiter.room = True
                waiter.given.release()
            else:
                self._count -= 1

    def close(self) -> None:
        """Close what is free, refuse who waits and who comes; what is held is closed when it is released."""
        with self._mutex:
            self._closed = True
            free, self._free = self._free, []
            self._count -= len(free)
            waiters, self._waiters = self._waiters, deque()
            for waiter in waiters:
                waiter.given.release()
        for resource in free:
            resource.close()

    def busy(self, timeout: float) -> DatabaseBusyError:
        """Return the error for who waited so many seconds in vain: it says who holds them and since when."""
        with self._mutex:
            return self._busy(timeout)

    def _busy(self, timeout: float) -> DatabaseBusyError:
        return DatabaseBusyError(
            f"the {self._name} was not given up within {timeout:.3f} s: {self._holders()}. "
            "End that unit sooner, or raise busy_timeout"
        )

    def _holders(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        now = monotonic()
        held = []
        for ident, since in self._held.values():
            doing = self.occupation(ident) if self.occupation is not None else None
            holder = f"thread {names.get(ident, ident)!r} holds it since {now - since:.3f} s"
            held.append(f"{holder}, doing {doing}" if doing else holder)
        return "; ".join(held) or "it is being opened"


def _closed() -> DatabaseClosedError:
    return DatabaseClosedError("the database was closed: open it again")
