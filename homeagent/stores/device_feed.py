"""The part of the store of devices that reads the feed of device changes."""

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
# The statement selects the change with the given number and all later changes. If the feed no longer contains the
# number, the reader can have missed changes, and the statement selects only the newest row.
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
    """Return the changes after a number from the rows of `CHANGES`, or a `reset` change if the number is not kept."""
    if rows and rows[0].number != after:
        return [rows[0].model_copy(update={"device_id": None, "kind": DeviceChangeKind.RESET})]
    return rows[1:]


def check_number(after: int) -> int:
    """Return the argument if it can be the number of a device change."""
    if type(after) is not int or not 0 <= after < 2**63:
        raise InvalidArgumentError("after must be the number of a device change: a whole number, 0 or more")
    return after


class DeviceFeed(Store):
    """Base class of `DeviceStore`."""

    __slots__ = ()

    @reading
    def changes(self, *, after: int = 0, limit: int = 100) -> Sequence[DeviceChange]:
        """Return the device changes after a number, oldest first.

        If the change feed no longer contains the number, the method returns a single change of the kind `reset`, and
        the caller must read all devices again. Pass the number of this change to the next call.

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
        """Delete the oldest changes, up to the first change after `before`. Return the number of deleted changes."""
        return self._unit.write(DELETE_OLD, before=check_timestamp(before, "before"), limit=check_limit(limit))
