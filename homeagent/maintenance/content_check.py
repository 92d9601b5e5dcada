"""Check the content of a SQLite file while the database is open. `Database.open` does not check a large file."""

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

logger: logging.Logger = logging.getLogger("homeagent")


class ContentCheck:
    """Object that periodically checks each table of an open SQLite file. The first check is due at once."""

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
        """If a check is due, check the remaining tables. If a table is damaged, raise CorruptDatabaseError."""
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
                "%s: the check of table %s was stopped after %g s: run homeagent doctor --thorough",
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
