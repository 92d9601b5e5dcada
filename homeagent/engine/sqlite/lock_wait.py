"""Waiting for the write lock of another process, so that a waiting process gets a turn next to one that never pauses.

SQLite's own busy handler tries again after 1, 2, 5, 10 and at last every 100 ms. A process that commits and begins
again at once holds the lock nearly all the time, so a process that waits in this way rarely meets the short moments
between: of eight writing processes some got no turn for seconds. There is no queue between processes, but a process
that tries more often is luckier. The first tries are close together, since most waits are short, and so are the tries
of a process that has waited for long. After a second the lock is not contended but held: then the tries are far apart.
"""

from __future__ import annotations

from collections.abc import Callable
from random import uniform
from time import monotonic, sleep

__all__ = ["LockWait"]

# For how long a process has waited, and up to how long the pause before the next try is then, in seconds. Each pause
# is drawn between half of that and all of it, so that two processes don't keep meeting.
_PAUSES = ((0.002, 0.001), (0.04, 0.005), (1.0, 0.002))
_LAST_PAUSE = 0.01


class LockWait:
    """The busy handler of a connection (https://sqlite.org/c3ref/busy_handler.html).

    Args:
        timeout: how long to wait for a lock, in seconds.
        began: is called when a wait begins.
    """

    def __init__(self, timeout: float, began: Callable[[], object]) -> None:
        self._timeout = timeout
        self._began = began
        self._since = 0.0

    def __call__(self, attempts: int) -> bool:
        """Wait before the next try; False if the time is over."""
        now = monotonic()
        if attempts == 0:
            self._since = now
            self._began()
        waited = now - self._since
        left = self._timeout - waited
        if left <= 0:
            return False
        pause = next((pause for until, pause in _PAUSES if waited < until), _LAST_PAUSE)
        sleep(min(uniform(pause / 2, pause), left))  # noqa: S311  it parts processes, it keeps no secret
        return True
