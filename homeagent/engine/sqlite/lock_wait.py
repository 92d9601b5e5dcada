"""Wait for the write lock of another process. SQLite's busy handler tries only every 100 ms after some tries, and let
processes wait for seconds in a test with eight writing processes. Pauses of less than 2 ms between two tries raised the
99th percentile of the write times by a factor of two to five.
"""

from __future__ import annotations

from collections.abc import Callable
from random import uniform
from time import sleep

from homeagent.clock import monotonic

_PAUSE = (0.001, 0.005)
"""Range of the random pause between two tries, in seconds. Equal pauses could let two processes always try together."""


class LockWait:
    """A busy handler for SQLite (https://sqlite.org/c3ref/busy_handler.html)."""

    def __init__(self, timeout: float, began: Callable[[], object]) -> None:
        self._timeout = timeout
        self._began = began
        self._since = 0.0

    def __call__(self, attempts: int) -> bool:
        """Pause before the next try to get the lock. Return False if the wait has reached the timeout."""
        now = monotonic()
        if attempts == 0:
            self._since = now
            self._began()
        left = self._timeout - (now - self._since)
        if left <= 0:
            return False
        sleep(min(uniform(*_PAUSE), left))  # noqa: S311  the random number is not a secret
        return True
