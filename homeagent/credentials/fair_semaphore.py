"""A fair semaphore: callers get places in order of arrival, and only a bounded number of callers may wait."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakSet

from homeagent.errors import TooManyAttemptsError

__all__ = ["FairSemaphore"]

_RETRY_AFTER = timedelta(seconds=1)
"""How long a caller that finds the queue full should wait: the time of a few hashes."""


class FairSemaphore:
    """Lets so many callers through at once. A forked child begins with all of its places free.

    Args:
        places: how many, 1 or more.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        # A signal's handler may come while its own thread holds it, and ask for a place.
        self._lock = threading.RLock()
        self._free = self._places
        self._queue: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """How many callers wait at this moment."""
        return len(self._queue)

    def _give_back(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1

    def _withdraw(self, turn: threading.Event) -> bool:
        """Leave the queue. Return False where the place was handed over in the meantime."""
        with self._lock:
            if turn.is_set():
                return False
            self._queue.remove(turn)
            return True

    def _take(self, timeout: float, most_waiting: int) -> bool:
        turn = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            if len(self._queue) >= most_waiting:
                raise TooManyAttemptsError(
                    f"{len(self._queue)} slow hashes of secrets wait for their turn already", retry_after=_RETRY_AFTER
                )
            self._queue.append(turn)
        try:
            return turn.wait(timeout) or not self._withdraw(turn)
        except BaseException:
            # Ctrl-C while waiting: a place handed to a caller who has gone would be lost to all the others.
            if not self._withdraw(turn):
                self._give_back()
            raise

    @contextmanager
    def turn(self, timeout: float, *, most_waiting: int) -> Iterator[bool]:
        """Hold a place for as long as the block runs.

        Args:
            timeout: how long to wait for it, in seconds.
            most_waiting: how many callers may wait, this caller included; 0 or more.

        Returns:
            False where none came free in time.

        Raises:
            TooManyAttemptsError: no place is free, and `most_waiting` callers wait already.
        """
        taken = self._take(timeout, most_waiting)
        try:
            yield taken
        finally:
            if taken:
                self._give_back()


_all: WeakSet[FairSemaphore] = WeakSet()


def _free_all_places() -> None:
    for semaphore in _all:
        semaphore._reset()


# The threads that held or awaited a place did not come along into the child, and would never give it back there.
os.register_at_fork(after_in_child=_free_all_places)
