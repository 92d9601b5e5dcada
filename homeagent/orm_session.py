"""The ORM session of a unit of work, in the unit's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event, inspect, select, tuple_
from sqlmodel import Session

from homeagent.errors import UnitStateError

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper, SessionTransaction

    from homeagent.engine.connection import StoreConnection
    from homeagent.engine.statements import Statement
    from homeagent.transaction import Transaction

_ROWS_AT_ONCE = 500
"""Number of expired rows that one SELECT loads."""


class UnitSession(Session):
    """ORM session of a unit. The method `commit()` only flushes. The method `rollback()` rolls back the unit."""

    def __init__(self, unit: Transaction, connection: StoreConnection) -> None:
        super().__init__(
            bind=connection.orm_connection(),
            join_transaction_mode="rollback_only",
            expire_on_commit=False,
            info={"now": unit.now},
        )
        self._unit = unit
        self._dialect = connection.dialect

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the connection of the unit. If the unit has ended, raise UnitStateError."""
        self._unit._require_connection()
        return super().get_bind(*args, **kwargs)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction. For a nested transaction, send SAVEPOINT immediately."""
        transaction = super().begin(nested)
        if nested:
            # Without this call, SQLAlchemy would send SAVEPOINT after the writes of the stores in the block.
            self.connection()
        return transaction

    def commit(self) -> None:
        """Flush the pending changes. The changes are committed when the unit of work ends."""
        self._unit._require_connection()
        self.flush()

    def rollback(self) -> None:
        """Roll back the unit of work."""
        self._unit.rollback()

    def expire_written(self, statement: Statement[Any]) -> None:
        """After a store's write, expire the affected objects and collections."""
        compiled = statement.compiled(self._dialect)
        if not compiled.writes:
            return
        if compiled.target is None:
            self.expire_all()
            return
        for row in self.identity_map.values():
            state = inspect(row)
            mapper = state.mapper
            if _is_changed(mapper.local_table, compiled.target, compiled.cascade):
                self.expire(row)
                continue
            stale = [
                each.key
                for each in mapper.relationships
                if each.key in state.dict
                and any(
                    table is not None and _is_changed(table, compiled.target, compiled.cascade)
                    for table in (each.mapper.local_table, each.secondary)
                )
            ]
            if stale:
                self.expire(row, stale)

    def complete(self) -> None:
        """Flush the pending changes. Reload expired objects for use after the unit."""
        if not self._unit._require_connection().has_orm_transaction:
            raise UnitStateError(
                "the transaction of uow.session's connection was committed or rolled back inside the unit: use "
                "rollback() or savepoint() of the unit instead"
            )
        self.flush()
        expired: dict[Mapper[Any], list[Any]] = {}
        for row in self.identity_map.values():
            state = inspect(row)
            if state.expired_attributes.intersection(state.mapper.column_attrs.keys()):
                expired.setdefault(state.mapper, []).append(state.identity)
        for mapper, keys in expired.items():
            key = tuple_(*mapper.primary_key)
            for start in range(0, len(keys), _ROWS_AT_ONCE):
                rows = select(mapper).where(key.in_(keys[start : start + _ROWS_AT_ONCE]))
                self.scalars(rows.execution_options(populate_existing=True)).unique().all()


@event.listens_for(UnitSession, "after_rollback")
def _after_rollback(session: UnitSession) -> None:
    """Roll back the unit after a rollback by the session."""
    session._unit._end_after_rollback()


def _is_changed(table: Any, target: str, cascade: str | None) -> bool:
    """Return True if a statement can change the table (see `Compiled.cascade`)."""
    if table.fullname == target:
        return True
    return cascade is not None and any(
        getattr(key, cascade) not in (None, "NO ACTION", "RESTRICT")
        and key.column.table is not table
        and _is_changed(key.column.table, target, cascade)
        for key in getattr(table, "foreign_keys", ())
    )
