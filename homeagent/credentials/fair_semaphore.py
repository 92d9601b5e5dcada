"""A fair (first in, first out) semaphore with a bounded number of waiting callers."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakSet

from homeagent.errors import TooManyAttemptsError

_RETRY_AFTER = timedelta(seconds=1)
"""Suggested wait of a caller if the queue is full. A second is the time of a few hashes."""


class FairSemaphore:
    """A semaphore with a maximum number of holders (places). In a forked child process, all places are free."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        # The lock is reentrant, because a signal handler can use the semaphore while the thread holds the lock.
        self._lock = threading.RLock()
        self._free = self._places
        self._queue: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """The number of waiting callers."""
        return len(self._queue)

    def _release(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1

    def _acquire(self, timeout: float, most_waiting: int) -> bool:
        handed_over = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            if len(self._queue) >= most_waiting:
                raise TooManyAttemptsError(
                    f"{len(self._queue)} slow hashes of secrets wait already", retry_after=_RETRY_AFTER
                )
            self._queue.append(handed_over)
        interrupted = True
        try:
            handed_over.wait(timeout)
            interrupted = False
        finally:
            with self._lock:
                taken = handed_over.is_set()
                if not taken:
                    self._queue.remove(handed_over)
            if interrupted and taken:
                # Ctrl-C interrupted the wait after another thread had handed over a place. Release the place.
                self._release()
        return taken

    @contextmanager
    def turn(self, timeout: float, *, most_waiting: int) -> Iterator[bool]:
        """Yield True with a place, or False after the timeout in seconds. Raise an error if the queue is full."""
        taken = self._acquire(timeout, most_waiting)
        try:
            yield taken
        finally:
            if taken:
                self._release()


_all: WeakSet[FairSemaphore] = WeakSet()


def _free_all_places() -> None:
    for semaphore in _all:
        semaphore._reset()


# In a forked child, free all places in the semaphores, because the parent's threads do not run in the child.
os.register_at_fork(after_in_child=_free_all_places)
