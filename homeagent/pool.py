"""A fair (first in, first out) pool of resources. A resource is a connection, or a permission to run a slow hash. On
SQLite, the pool of writers has one connection. Do not use a `threading.Lock`, which is not fair.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Generic, Protocol, TypeVar

from homeagent.clock import monotonic
from homeagent.errors import DatabaseBusyError, DatabaseClosedError


class QueueFullError(Exception):
    """The queue of a pool already has the maximum number of waiting callers."""


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class _Waiter(Generic[T]):
    __slots__ = ("has_place", "ident", "notified", "resource")

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.notified = threading.Lock()
        self.notified.acquire()
        self.resource: T | None = None
        self.has_place = False


class ConnectionPool(Generic[T]):
    """A pool of resources. The argument `size=` is the maximum number of resources. After each wait, the pool calls
    `waited()` with the time in seconds.
    """

    def __init__(
        self, size: int, make: Callable[[], T], *, name: str, waited: Callable[[float], object] | None = None
    ) -> None:
        self._size = size
        self._make = make
        self._name = name
        self._waited = waited
        # The lock must be reentrant, because a signal handler can use the database.
        self.mutex: threading.RLock = threading.RLock()
        # A fork waits for this lock during the creation of a resource.
        self.making: threading.RLock = threading.RLock()
        self._free: list[T] = []
        self._waiters: deque[_Waiter[T]] = deque()
        self._count = 0
        self._closed = False
        self._held: dict[T, tuple[int, float]] = {}
        self.occupation: Callable[[int], str | None] | None = None
        """Function that names the work of a thread for other threads."""

    @property
    def waiting(self) -> int:
        """The number of waiting callers."""
        return len(self._waiters)

    def acquire(self, timeout: float, *, most_waiting: int | None = None) -> T:
        """Return a resource. After the timeout in seconds, raise DatabaseBusyError. If `most_waiting` callers already
        wait, raise QueueFullError at once.
        """
        holder = get_ident(), monotonic()
        resource: T | None = None
        waiter: _Waiter[T] | None = None
        has_place = False
        try:
            with self.mutex:
                if self._free and not self._waiters:
                    # Do not add function calls or loops between the next two lines. CPython could run a signal handler
                    # there. If the handler raises an error, the pool loses the resource (see `tests/test_pool.py`).
                    resource = self._free[-1]
                    self._held[resource] = holder
                    del self._free[-1]
                    return resource
                if self._closed:
                    raise closed_error()
                if self._count < self._size:
                    self._count += 1
                    has_place = True
                else:
                    if most_waiting is not None and len(self._waiters) >= most_waiting:
                        raise QueueFullError
                    waiter = _Waiter(holder[0])
                    self._waiters.append(waiter)
            if waiter is not None:
                has_place = self._wait(waiter, timeout)
                resource = waiter.resource
            if has_place:
                holder = holder[0], monotonic()
                with self.making:
                    made = self._make()
                with self.mutex:
                    self._held[made] = holder
                    resource = made
        except BaseException:
            if resource is not None:
                self.release(resource)
            elif waiter is not None:
                self._leave_queue(waiter)
            elif has_place:
                self._free_place()
            raise
        if resource is None:
            raise closed_error()
        return resource

    def _wait(self, waiter: _Waiter[T], timeout: float) -> bool:
        """Wait for a resource. Return True if the caller must create the resource."""
        since = monotonic()
        try:
            given = waiter.notified.acquire(timeout=max(timeout, 0))
        finally:
            if self._waited is not None:
                self._waited(monotonic() - since)
        if not given:
            with self.mutex:
                # After the timeout, another thread can still serve the waiter.
                if waiter in self._waiters:
                    raise self.busy(timeout)
        return waiter.has_place

    def _leave_queue(self, waiter: _Waiter[T]) -> None:
        """Remove a waiter from the queue. If the waiter has already received a resource, release the resource. If the
        waiter may create a resource, call `_free_place()`.
        """
        with self.mutex:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return
        if waiter.resource is not None:
            self.release(waiter.resource)
        elif waiter.has_place:
            self._free_place()

    def release(self, resource: T) -> None:
        """Pass a resource to the thread with the longest wait. If no thread waits, keep the resource for later."""
        with self.mutex:
            if self._waiters:
                since = monotonic()
                waiter = self._waiters[0]
                del self._waiters[0]
                self._held[resource] = waiter.ident, since
                waiter.resource = resource
                waiter.notified.release()
                return
            del self._held[resource]
            if not self._closed:
                self._free.append(resource)
                return
            self._count -= 1
        resource.close()

    def release_own(self, resource: T) -> None:
        """After an interrupt, release a resource that the calling thread still holds."""
        holder = self._held.get(resource)
        if holder is not None and holder[0] == get_ident():
            self.release(resource)

    def discard(self, resource: T) -> None:
        """Close a resource, and make room for a new resource."""
        try:
            resource.close()
        finally:
            self._free_place(resource)

    def discard_free(self) -> None:
        """Close the resources that no thread holds."""
        with self.mutex:
            free, self._free = self._free, []
            self._count -= len(free)
        for resource in free:
            resource.close()

    def _free_place(self, resource: T | None = None) -> None:
        """Let the next waiting thread create a resource."""
        with self.mutex:
            if resource is not None:
                del self._held[resource]
            if self._waiters and not self._closed:
                waiter = self._waiters[0]
                del self._waiters[0]
                waiter.has_place = True
                waiter.notified.release()
            else:
                self._count -= 1

    def close(self) -> None:
        """Close the free resources. Waiting callers and later callers of `acquire()` get DatabaseClosedError."""
        with self.mutex:
            self._closed = True
            # Empty the list here, because `acquire()` lends a free resource also after the close.
            free, self._free = self._free, []
            self._count -= len(free)
            waiters, self._waiters = self._waiters, deque()
            for waiter in waiters:
                waiter.notified.release()
        for resource in free:
            resource.close()

    def busy(self, timeout: float) -> DatabaseBusyError:
        """Return the error for a timeout. The message names the threads that hold the resources."""
        with self.mutex:
            holders = self._holders()
        return DatabaseBusyError(
            f"could not get {self._name} within {timeout:.3f} s: {holders}. "
            "Make that unit of work shorter, or raise busy_timeout"
        )

    def _holders(self) -> str:
        """Describe the threads that hold resources, for an error message. The caller must hold `self.mutex`."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        now = monotonic()
        held = []
        for ident, since in self._held.values():
            doing = self.occupation(ident) if self.occupation is not None else None
            holder = f"thread {names.get(ident, ident)!r} has held it for {now - since:.3f} s"
            held.append(f"{holder}, doing {doing}" if doing else holder)
        return "; ".join(held) or "a connection is being opened"


def closed_error() -> DatabaseClosedError:
    """Return the error for a call of a closed database."""
    return DatabaseClosedError("the database was closed: open it again")
