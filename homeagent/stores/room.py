"""Limit for the rows of one device. Counting 10,000 rows takes as long as 40 inserts, so a process does not count
before each insert. After a count, the process can add several rows (a grant) without a new count. A grant is at most a
fiftieth of the limit. Each process can exceed the limit by less than one grant. Therefore 49 processes together store
fewer rows than twice the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select

from homeagent.engine.statements import Statement

if TYPE_CHECKING:
    from homeagent.unit_of_work import UnitOfWork

_MOST_GRANTS = 10_000

# PostgreSQL releases an advisory lock at the end of the transaction.
_LOCK_DEVICE = Statement[None](select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("device_id"), 0))))


def has_room(
    unit: UnitOfWork, kind: str, device_id: str, limit: int, now: datetime, count: Callable[[str, datetime], int]
) -> bool:
    """If the device can add a row, reduce the grant by one row, and return True. If the device has reached the limit,
    return False. The argument `count` is a function that counts the unexpired rows of a device.
    """
    grants = unit.settings.grants
    key = (kind, device_id, limit)
    # Two threads can't take the same row of the grant, because the function `next()` is atomic.
    if key in grants and next(grants[key], None) is not None:
        return True
    granted = _grant(limit, count(device_id, now))
    # On PostgreSQL, a count does not include the rows of uncommitted transactions. Without the lock, each transaction
    # that is open at the same time could exceed the limit by one row.
    if granted == 1 and unit.settings.engine.dialect_name == "postgresql":
        unit.one(_LOCK_DEVICE, device_id=device_id)
        granted = _grant(limit, count(device_id, now))
    if len(grants) >= _MOST_GRANTS:
        grants.clear()
    grants[key] = iter(range(granted - 1))  # - 1: the caller adds the first row of the grant
    return granted > 0


def _grant(limit: int, stored: int) -> int:
    room = limit - stored
    return max(1, min(room // 8, limit // 50)) if room > 0 else 0
