"""A limit of the rows of one device, which the store counts only at intervals.

Counting 10,000 rows takes as long as 40 inserts. Therefore a process that has counted the rows of a device may add
several rows without another count. The number of these rows is the grant. The grant is an eighth of the number of rows
that may still be added, but at most a fiftieth of the limit.

Several processes together do not store more than twice the limit, because a process gets a grant only if fewer rows
than the limit are stored. When the limit is reached, each process can use up only the rest of its own grant, which is
less than a fiftieth of the limit. Therefore 49 processes together stay below twice the limit, even if each process got
the largest possible grant. On SQLite, a process counts and adds its row in one transaction, and no other
writer can add a row in between. On PostgreSQL, a transaction that counts does not see the rows of transactions that
have not committed. If the limit is low, or few rows may still be added, the grant can be only one row. For a grant of
one row, the transaction takes a lock for the device, and counts again. Without the lock, each open transaction could
exceed the limit by one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select

from homeagent.engine.statements import Statement

if TYPE_CHECKING:
    from homeagent.stores.store import Unit

__all__ = ["has_room"]

_MOST_GRANTS = 10_000

# PostgreSQL releases the advisory lock of the device at the end of the transaction.
_LOCK_DEVICE = Statement[None](select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("device_id"), 0))))


def has_room(unit: Unit, kind: str, device_id: str, limit: int, count: Callable[[], int]) -> bool:
    """Return True if the device can have another row. The new row then uses up a part of the process's grant.

    Args:
        unit: writing unit that adds the row.
        kind: name of the table, because each table has its own limit.
        device_id: id of the device.
        limit: maximum number of the device's rows.
        count: function that counts the device's rows.
    """
    grants: dict[tuple[str, str, int], Iterator[int]] = unit.settings.memory.setdefault("grants", {})
    # The key of the dictionary contains the limit, because each limit has separate grants.
    key = (kind, device_id, limit)
    # Each call of the function `next()` takes a row from the grant. Two threads can't take the same row, because the
    # function `next()` is atomic.
    if key in grants and next(grants[key], None) is not None:
        return True
    granted = _grant(limit, count())
    if granted == 1 and unit.settings.engine.dialect_name == "postgresql":
        unit.one(_LOCK_DEVICE, device_id=device_id)
        granted = _grant(limit, count())
    if len(grants) >= _MOST_GRANTS:
        grants.clear()
    grants[key] = iter(range(granted - 1))  # the current call uses up the first row of the grant
    return granted > 0


def _grant(limit: int, stored: int) -> int:
    room = limit - stored
    return max(1, min(room // 8, limit // 50)) if room > 0 else 0
