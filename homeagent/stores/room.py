"""Limit for the rows of one device. Counting is slow, so a process does not count before each insert. A grant is the
number of inserts between two counts of a process. A grant is at most 2 % of the limit, but at least 1. Several
processes together can exceed the limit. If the limit is 50 or more, the grants of 49 processes are at most 98 % of the
limit. So the rows of up to 49 processes stay below twice the limit.

On PostgreSQL, a transaction does not count rows that simultaneous transactions add. So each simultaneous transaction
counts as a process. The rows stay below twice the limit for up to 49 simultaneous transactions that add one row each.
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
    """Return True if the caller can add a row for the device. Call this function once for each new row. The function
    `count()` returns the number of rows to compare with the limit.
    """
    grants = unit.settings.grants
    key = (kind, device_id, limit)
    # Two threads can't get the same number, because `next()` is atomic.
    # Another thread can clear the dictionary. So look the key up only once.
    unused = grants.get(key)
    if unused is not None and next(unused, None) is not None:
        return True
    granted = _grant(limit, count(device_id, now))
    # On PostgreSQL, a count does not include uncommitted rows of other transactions. Without the lock, simultaneous
    # transactions could exceed the limit.
    if granted == 1 and unit.settings.engine.dialect_name == "postgresql":
        unit.one(_LOCK_DEVICE, device_id=device_id)
        granted = _grant(limit, count(device_id, now))
    if len(grants) >= _MOST_GRANTS:
        grants.clear()
    # Subtract 1 from the grant, because the caller adds one row immediately.
    grants[key] = iter(range(granted - 1))
    return granted > 0


def _grant(limit: int, stored: int) -> int:
    room = limit - stored
    return max(1, min(room // 8, limit // 50)) if room > 0 else 0
