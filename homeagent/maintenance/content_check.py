"""The content of a SQLite file, checked beside the work: a file that is too large to be checked at every opening."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from homeagent.clock import monotonic
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.sqlite.integrity import check_table
from homeagent.errors import CorruptDatabaseError
from homeagent.migrations import VERSION_TABLE
from homeagent.models import TABLES

if TYPE_CHECKING:
    from homeagent.engine.engine import Engine

__all__ = ["ContentCheck"]

logger = logging.getLogger("homeagent")


class ContentCheck:
    """Checks the content of an open database from time to time, a table and its indexes in each read-only unit.

    A server checks its own files: there is nothing to do then.

    Args:
        engine: the database.
        every: how long to wait between two checks; the first is due at once.
        time_budget: how long one check takes at most; what is left then waits for the next, which begins there.
        monotonic: the clock for both, in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        every: timedelta,
        time_budget: timedelta = timedelta(seconds=30),
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        self._engine = engine
        self._every = every.total_seconds()
        self._budget = time_budget.total_seconds()
        self._monotonic = monotonic
        self._due = monotonic()
        self._left: list[str] = []

    def run_if_due(self, stop: Callable[[], bool]) -> None:
        """Check what is due.

        Args:
            stop: ends it early.

        Raises:
            CorruptDatabaseError: the database is damaged. From now on every unit gets this error.
        """
        engine = self._engine
        now = self._monotonic()
        if not isinstance(engine, SQLiteEngine) or now < self._due:
            return
        self._left = self._left or [*TABLES, VERSION_TABLE]
        deadline = now + self._budget
        first = self._left[0]
        while self._left and not stop():
            try:
                done = check_table(engine, self._left[0], give_up=lambda: stop() or self._monotonic() >= deadline)
            except CorruptDatabaseError as error:
                logger.error("%s", error, extra={"event": "content_damaged", "path": str(engine.path)})
                raise
            if not done:
                break
            del self._left[0]
        if self._left and self._left[0] == first and not stop():
            logger.warning(
                "%s: checking the table %s was given up after %g s",
                engine.path,
                first,
                self._budget,
                extra={
                    "event": "content_check_gave_up",
                    "path": str(engine.path),
                    "table": first,
                    "seconds": self._budget,
                },
            )
            del self._left[0]
        if not stop():
            self._due = self._monotonic() + self._every
