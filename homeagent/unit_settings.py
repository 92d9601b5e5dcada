"""Settings that all units of work of one database share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from homeagent.clock import Clock, system_clock
from homeagent.models.limits import Limits
from homeagent.models.types import check_timestamp

if TYPE_CHECKING:
    from homeagent.engine.engine import Engine
    from homeagent.unit_of_work import UnitOfWork

_DEFAULT_LIMITS = Limits()


class UnitSettings:
    """Settings and state that all units of one database share. The timeout is in seconds."""

    __slots__ = ("clock", "engine", "grants", "limits", "timeout", "unit", "writing")

    def __init__(
        self, engine: Engine, clock: Clock, timeout: float, unit: type[UnitOfWork], limits: Limits = _DEFAULT_LIMITS
    ) -> None:
        self.engine: Engine = engine
        self.clock: Clock = clock
        self.timeout: float = timeout
        self.unit: type[UnitOfWork] = unit
        self.limits: Limits = limits
        # Rows that the stores may add without a count (see `homeagent.stores.room`)
        self.grants: dict[tuple[str, str, int], Iterator[int]] = {}
        # Ids of the threads that have an open write unit
        self.writing: set[int] = set()

    def now(self) -> datetime:
        """Return the clock's time as a timestamp in UTC, rounded down to milliseconds."""
        clock = self.clock
        # The default clock already returns a timestamp in UTC in whole milliseconds.
        return clock() if clock is system_clock else check_timestamp(clock(), "the clock's instant")
