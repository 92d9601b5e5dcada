"""Limit for the rows of one device. The store does not count the rows at each insert.

Counting 10,000 rows takes as long as 40 inserts. After a count, a process gets a grant: the process can add a number of
rows without counting again. The grant is an eighth of the rows that the device can still have, and at most a fiftieth
of the limit.

If a count shows that the device has reached the limit, the process gets no grant. After the device has reached the
limit, a process can still add the rows that the process was granted before. Each process exceeds the limit by less than
a fiftieth of the limit, and 49 processes together store fewer rows than twice the limit. On SQLite, a process counts
the rows and adds a row in one transaction, so no other writer can add a row after the count. On PostgreSQL, a count
does not include the rows of uncommitted transactions. If the device is close to the limit, a process is granted only
one row at a time. Before the process adds this row, the transaction takes a lock for the device, and counts the rows
again. Without the lock, each transaction that is open at the same time could exceed the limit by one row.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select

from homeagent.engine.statements import Statement

if TYPE_CHECKING:
    from homeagent.stores.store import Unit

_MOST_GRANTS = 10_000

# PostgreSQL releases the advisory lock of the device at the end of the transaction.
_LOCK_DEVICE = Statement[None](select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("device_id"), 0))))


def has_room(
    unit: Unit, kind: str, device_id: str, limit: int, now: datetime, count: Callable[[str, datetime], int]
) -> bool:
    """Return True if the device can have another row. A result of True uses up one row of the process's grant.

    Args:
        unit: unit of work that adds the row.
        kind: name of the table. Each table has a separate limit.
        device_id: id of the device.
        limit: maximum number of the device's rows.
        now: current time, which the function passes to `count()`.
        count: function that counts the rows of the given device that have not expired at the given time.
    """
    grants = unit.settings.grants
    # A process has a separate grant for each limit.
    key = (kind, device_id, limit)
    # Each call of the function `next()` uses up one row of the grant. Two threads can't take the same row, because the
    # function `next()` is atomic.
    if key in grants and next(grants[key], None) is not None:
        return True
    granted = _grant(limit, count(device_id, now))
    if granted == 1 and unit.settings.engine.dialect_name == "postgresql":
        unit.one(_LOCK_DEVICE, device_id=device_id)
        granted = _grant(limit, count(device_id, now))
    if len(grants) >= _MOST_GRANTS:
        grants.clear()
    grants[key] = iter(range(granted - 1))  # the caller of this function adds the first row of the grant
    return granted > 0


def _grant(limit: int, stored: int) -> int:
    room = limit - stored
    return max(1, min(room // 8, limit // 50)) if room > 0 else 0
