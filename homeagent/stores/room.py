"""Limit for the rows of one device. The store does not count the rows at each insert.

Counting 10,000 rows takes as long as 40 inserts. Therefore a process that has counted the rows gets a grant, which is a
number of rows to add without another count. The grant is an eighth of the free rows below the limit, but at most a
fiftieth of the limit.

A process is allowed to add rows without a count only if the device has fewer rows than the limit. When the limit is
reached, a process can add only the rest of its grant, which is less than a fiftieth of the limit. Therefore 49
processes together store less than twice the limit, even with the largest possible grants. On SQLite, a process counts
the rows and adds a row in one transaction, so no other writer can add a row after the count. On PostgreSQL, a count
does not include the rows of uncommitted transactions. If few rows are free below the limit, a grant can be only one
row. Before a grant of one row, the transaction takes a lock for the device, and counts again. Without the lock, each
transaction that is open at the same time could exceed the limit by one row.
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
    """Return True if the device can have another row. The new row uses up one row of the process's grant.

    Args:
        unit: unit of work that adds the row.
        kind: name of the table. Each table has a separate limit.
        device_id: id of the device.
        limit: maximum number of the device's rows.
        now: current time, which the function passes to `count()`.
        count: function that counts the rows of the given device that have not expired at the given time.
    """
    grants = unit.settings.grants
    # Grants for different limits are separate, so the key of the dictionary contains the limit.
    key = (kind, device_id, limit)
    # Each call of the function `next()` takes a row from the grant. Two threads can't take the same row, because the
    # function `next()` is atomic.
    if key in grants and next(grants[key], None) is not None:
        return True
    granted = _grant(limit, count(device_id, now))
    if granted == 1 and unit.settings.engine.dialect_name == "postgresql":
        unit.one(_LOCK_DEVICE, device_id=device_id)
        granted = _grant(limit, count(device_id, now))
    if len(grants) >= _MOST_GRANTS:
        grants.clear()
    grants[key] = iter(range(granted - 1))  # the current call uses up the first row of the grant
    return granted > 0


def _grant(limit: int, stored: int) -> int:
    room = limit - stored
    return max(1, min(room // 8, limit // 50)) if room > 0 else 0
