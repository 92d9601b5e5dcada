"""Methods for reading the feed of device changes, as a part of the store of devices.

homeagent deletes the oldest rows of the change feed first, and always keeps the newest row. A reader has missed no
change if the change feed still contains the last change that the reader has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, case, delete, func, select

from homeagent.engine.statements import Statement, constant
from homeagent.errors import InvalidArgumentError
from homeagent.models.device_change import DeviceChange, DeviceChangeKind
from homeagent.models.types import check_limit, check_timestamp
from homeagent.stores.store import Store, reading, writing

_columns: Any = DeviceChange.__table__.c
_newest = select(func.max(_columns.number)).scalar_subquery()
_after = bindparam("after", type_=_columns.number.type)
_is_kept = select(constant(1, _columns.number.type)).where(_columns.number == _after).exists()

NEWEST = Statement[int](select(func.max(_columns.number)))
# If the change feed contains the change with the given number, the statement selects this change and all later changes.
# If the change feed does not contain the change, the statement selects only the newest row.
CHANGES = Statement[DeviceChange](
    select(DeviceChange)
    .where(_columns.number >= case((_is_kept, _after), else_=_newest))
    .order_by(_columns.number)
    .limit(bindparam("limit"))
)
_first_kept = select(_columns.number).where(_columns.at > bindparam("before")).order_by(_columns.number).limit(1)
_is_old = _columns.number < func.coalesce(_first_kept.scalar_subquery(), _newest)
COUNT_OLD = Statement[int](select(func.count()).select_from(DeviceChange).where(_is_old))
DELETE_OLD = Statement[DeviceChange](
    delete(DeviceChange).where(
        _columns.number.in_(select(_columns.number).where(_is_old).order_by(_columns.number).limit(bindparam("limit")))
    )
)


def changes_of(rows: list[DeviceChange], after: int) -> list[DeviceChange]:
    """Return the device changes after a number. Pass the rows that the SQL statement with the name `CHANGES` returned.
    If the change feed does not contain the number, return one change of the kind `reset` with the newest number.
    """
    if rows and rows[0].number != after:
        return [rows[0].model_copy(update={"device_id": None, "kind": DeviceChangeKind.RESET})]
    return rows[1:]


def check_number(after: int) -> int:
    """Return the argument if it can be the number of a device change. Otherwise raise InvalidArgumentError."""
    if type(after) is not int or not 0 <= after < 2**63:
        raise InvalidArgumentError("after must be the number of a device change: a whole number, 0 or more")
    return after


class DeviceFeed(Store):
    """Base class of `DeviceStore` with the methods that read the feed of device changes."""

    __slots__ = ()

    @reading
    def changes(self, *, after: int = 0, limit: int = 100) -> Sequence[DeviceChange]:
        """Return the device changes after a number, oldest first.

        If the change feed no longer contains the given number, the method returns a single change of the kind `reset`.
        A restore of the database also causes a change of the kind `reset`. After a change of the kind `reset`, the
        caller must read all devices again. The caller's next call then passes the number of the reset change as
        `after=…`.

        Args:
            after: number of the last change that the caller has read. Pass 0 if the caller has read no change yet.
            limit: maximum number of changes, 1 or more.
        """
        rows = self._unit.all(CHANGES, after=check_number(after), limit=check_limit(limit) + 1)
        return changes_of(rows, after)

    @reading
    def newest_change(self) -> int:
        """Return the number of the newest device change."""
        return self._unit.one(NEWEST) or 0

    @writing()
    def delete_changes(self, *, before: datetime, limit: int = 100) -> int:
        """Delete the oldest changes, and stop at the first change that is later than the given time.

        One call deletes at most the given number of changes. The method does not delete the newest change.

        Returns:
            The number of deleted changes.
        """
        return self._unit.write(DELETE_OLD, before=check_timestamp(before, "before"), limit=check_limit(limit))
