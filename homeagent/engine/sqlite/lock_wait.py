"""Waiting for the write lock of another process, so that whoever waits gets a turn beside one that never pauses.

SQLite's own waiting tries again after 1, 2, 5, 10 and at last every 100 ms. Who commits and begins again at once has
the lock nearly all the time, so one that waits like that meets the short moments between hardly ever: of eight writing
processes some got no turn for seconds, and a sweep beside a writer that never pauses got a few in a second. There is no
queue between processes, but who tries more often is luckier. So the first tries are close together, as most waits are
short, and so are those of who has waited for long. After a second of that nobody is merely unlucky, but the lock is
held: then they are far apart.
"""

from __future__ import annotations

import sqlite3
from random import uniform
from time import monotonic, sleep
from typing import Any

__all__ = ["PatientCursor"]

# For how long somebody has waited, and up to how long the pause before the next try is then, in seconds. Each pause is
# drawn between half of that and all of it, so that two processes don't keep meeting.
_PAUSES = ((0.002, 0.001), (0.04, 0.005), (1.0, 0.002))
_LAST_PAUSE = 0.01


class PatientCursor:
    """A driver's cursor that tries a statement again while another process has the lock.

    Args:
        cursor: the driver's, whose connection doesn't wait by itself.
        driver_errors: what that raises.
        timeout: how long to try, in seconds; then the driver's error is raised.
    """

    def __init__(self, cursor: Any, *, driver_errors: tuple[type[BaseException], ...], timeout: float) -> None:
        self._cursor = cursor
        self._driver_errors = driver_errors
        self._timeout = timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, statement: str, *parameters: Any) -> Any:
        """Run a statement, once it gets the lock."""
        begun = monotonic()
        while True:
            try:
                return self._cursor.execute(statement, *parameters)
            except self._driver_errors as error:
                waited = monotonic() - begun
                left = self._timeout - waited
                if left <= 0 or getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
            pause = next((pause for until, pause in _PAUSES if waited < until), _LAST_PAUSE)
            sleep(min(uniform(pause / 2, pause), left))  # noqa: S311  it parts processes, it keeps no secret
