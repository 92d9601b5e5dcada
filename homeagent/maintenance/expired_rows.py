"""Delete the expired rows of one table in batches, and skip rows to which an application's table refers.

After a constraint has refused a batch, each batch names its rows by key, and a refused batch is halved. The next batch
starts after the last row of the previous batch, so a sweep tries to delete each skipped row only once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, tuple_

from homeagent.engine.statements import Statement
from homeagent.errors import ConflictError
from homeagent.models.device import PENDING, Device
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.nonce import Nonce
from homeagent.models.types import earlier
from homeagent.stores.device_feed import COUNT_OLD
from homeagent.stores.device_statements import OVERDUE
from homeagent.stores.idempotency_key_statements import EXPIRED as EXPIRED_KEY
from homeagent.stores.nonces import EXPIRED as EXPIRED_NONCE
from homeagent.unit_of_work import UnitOfWork
from homeagent.unit_settings import UnitSettings

Kind = Literal["nonces", "idempotency_keys", "pending_devices", "device_changes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FIRST = datetime.min.replace(tzinfo=UTC)


class _Statements:
    def __init__(self, model: Any, expired: ColumnElement[bool], time: str = "expires_at") -> None:
        table = model.__table__
        key = list(table.primary_key.columns)
        order = [table.c[time], *key]
        self.names = [column.name for column in order]
        """Names of the columns of a page. Each name is also a parameter of the statements."""
        after = tuple_(*(bindparam(column.name, type_=column.type) for column in order))
        self.page = Statement[tuple[Any, ...]](
            select(*order).where(expired, tuple_(*order) > after).order_by(*order).limit(bindparam("limit"))
        )
        same = and_(*(column == bindparam(column.name, type_=column.type) for column in key))
        self.delete = Statement[Any](delete(table).where(same, expired))
        self.count = Statement[int](select(func.count()).select_from(table).where(expired))
        self.first = {column.name: _FIRST if column is table.c[time] else "" for column in order}


_STATEMENTS = {
    "nonces": _Statements(Nonce, EXPIRED_NONCE),
    "idempotency_keys": _Statements(IdempotencyKey, EXPIRED_KEY),
    "pending_devices": _Statements(Device, and_(PENDING, OVERDUE), "paired_at"),
}


class Batch(NamedTuple):
    """Result of a batch, with times in seconds. The count `found` includes skipped rows; `held` includes the commit."""

    deleted: int
    found: int
    worked: float
    held: float


class ExpiredRows:
    """The expired rows of one table. `rows.skipped` counts the skipped rows of each constraint."""

    def __init__(self, settings: UnitSettings, kind: Kind, grace: timedelta, monotonic: Callable[[], float]) -> None:
        self._settings = settings
        self._kind = kind
        self._grace = grace
        self._statements: Any = _STATEMENTS.get(kind)
        self._monotonic = monotonic
        self._after: dict[str, Any] | None = None
        self.skipped: Counter[str] = Counter()

    def count(self) -> int:
        """Return the number of expired rows, including the rows to which an application's table refers."""
        with UnitOfWork(self._settings, read_only=True) as unit:
            statement = COUNT_OLD if self._statements is None else self._statements.count
            return unit.one(statement, **self._times()) or 0

    def delete(self, limit: int) -> Batch:
        """Delete the next batch. The batch has at most the given number of rows."""
        if self._after is None:
            try:
                with UnitOfWork(self._settings, read_only=False) as unit:
                    begun = self._monotonic()
                    count = self._delete_batch(unit, limit)
                    worked = self._monotonic() - begun
                return Batch(count, count, worked, self._monotonic() - begun)
            except ConflictError:
                if self._statements is None:
                    # If the sweep skipped a device change, readers would not notice the deletion of later changes.
                    raise
                self._after = self._statements.first
        with UnitOfWork(self._settings, read_only=True) as unit:
            rows = unit.all(self._statements.page, **self._after, **self._times(), limit=limit)
        page = [dict(zip(self._statements.names, row, strict=True)) for row in rows]
        begun = self._monotonic()
        deleted = self._delete_each(page)
        self._after = page[-1] if page else self._after
        held = self._monotonic() - begun
        return Batch(deleted, len(page), held, held)

    def _delete_batch(self, unit: UnitOfWork, limit: int) -> int:
        if self._kind == "nonces":
            return unit.nonces.delete_expired(limit=limit)
        if self._kind == "idempotency_keys":
            return unit.idempotency_keys.delete_expired(limit=limit)
        if self._kind == "device_changes":
            return unit.devices.delete_changes(before=self._times()["before"], limit=limit)
        return unit.devices.delete_pending(paired_before=self._times()["before"], limit=limit)

    def _delete_each(self, page: Sequence[dict[str, Any]]) -> int:
        if not page:
            return 0
        try:
            with UnitOfWork(self._settings, read_only=False) as unit:
                return sum(unit.write(self._statements.delete, **row, **self._times()) for row in page)
        except ConflictError as error:
            if len(page) == 1:
                self.skipped[_name(error)] += 1
                return 0
        half = len(page) // 2
        return self._delete_each(page[:half]) + self._delete_each(page[half:])

    def _times(self) -> dict[str, datetime]:
        now = self._settings.now()
        return {"now": now, "before": earlier(now, self._grace)}


def _name(error: ConflictError) -> str:
    if error.table is None:
        return "a constraint"
    return f"table {error.table}" if error.constraint is None else f"{error.constraint} of table {error.table}"
