"""Wait for the write lock of another process. Frequent tries get the lock even if a process writes without pause.

SQLite's busy handler tries again after 1, 2, 5, 10, ... and at last every 100 ms. A process that commits and begins
again at once leaves the lock free only for short moments. SQLite's busy handler seldom tries at a moment at which the
lock is free. In a test with eight writing processes, some processes waited for seconds. A process that tries every few
milliseconds gets the lock. Too frequent tries make the lock move between processes too often, which slows all writes.
On a busy machine with eight writing processes, pauses of 0.5 to 2 ms raised the 99th percentile of the write times by a
factor of two to five. On a quiet machine, pauses of 0.5 to 2 ms made no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from random import uniform
from time import sleep

from homeagent.clock import monotonic

_PAUSE = (0.001, 0.005)
"""Range of the random pause between two tries, in seconds. Equal pauses could let two processes always try together."""


class LockWait:
    """A busy handler for SQLite (https://sqlite.org/c3ref/busy_handler.html). At the start of each wait, the handler
    calls the function `began()`.
    """

    def __init__(self, timeout: float, began: Callable[[], object]) -> None:
        self._timeout = timeout
        self._began = began
        self._since = 0.0

    def __call__(self, attempts: int) -> bool:
        """Pause before the next try to get the lock. Return False if the wait has reached the timeout, in seconds."""
        now = monotonic()
        if attempts == 0:
            self._since = now
            self._began()
        left = self._timeout - (now - self._since)
        if left <= 0:
            return False
        sleep(min(uniform(*_PAUSE), left))  # noqa: S311  the random number is not a secret
        return True
