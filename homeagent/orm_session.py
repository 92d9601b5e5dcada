"""The ORM session of a unit of work, in the unit's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event, inspect, select, tuple_
from sqlalchemy.orm import make_transient, selectinload
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.orm.collections import collection_adapter
from sqlmodel import Session

from homeagent.errors import UnitStateError

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, SessionTransaction

    from homeagent.engine.connection import StoreConnection
    from homeagent.transaction import Transaction

_ROWS_AT_ONCE = 500
"""Number of expired rows that one SELECT loads."""

# FastAPI and SQLModel leave out attributes whose names begin with "_sa".
_VALUES = "_sa_homeagent_values"
"""Name of the attribute that contains an object's last loaded values."""


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
        self._callbacks: WeakKeyDictionary[SessionTransaction, int] = WeakKeyDictionary()
        """For each nested transaction, the number of the unit's callbacks at the begin."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the connection of the unit. If the unit or its transaction has ended, raise UnitStateError."""
        self._unit._require_connection().require_transaction()
        return super().get_bind(*args, **kwargs)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction. For a nested transaction, send SAVEPOINT immediately."""
        transaction = super().begin(nested)
        if nested:
            self._callbacks[transaction] = len(self._unit._after_commit or ())
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

    def expire(self, instance: object, attribute_names: Iterable[str] | None = None) -> None:
        """Expire an object, and remember the loaded values for the end of the unit."""
        with _remembered(instance):
            super().expire(instance, attribute_names)

    def refresh(self, instance: object, *args: Any, **kwargs: Any) -> None:
        """Load an object again. SQLAlchemy also expires related objects, whose values must last."""
        with _remembered(instance):
            super().refresh(instance, *args, **kwargs)

    def expunge(self, instance: object) -> None:
        """Detach an object, with the current values of its row."""
        state = inspect(instance)
        if state.persistent:
            self._load([state])
        super().expunge(instance)

    def expire_all(self) -> None:
        """Expire all objects, and remember the loaded values for the end of the unit."""
        self._remember_all()
        super().expire_all()

    def _remember_all(self) -> None:
        """Remember the loaded values of all objects in the session."""
        for state in self.identity_map.all_states():
            if not state.expired or state.modified:
                _remember(state)

    def expire_written(self, target: str | None, cascade: str | None) -> None:
        """After a store's write, expire the affected objects, and the objects with a loaded relationship to an affected
        table. The class `Compiled` describes the arguments.
        """
        if target is None:
            self.expire_all()
            return
        for row in self.identity_map.values():
            state = instance_state(row)
            if state.expired:
                continue
            loaded = [each for each in state.mapper.relationships if each.key in state.dict]
            tables = [state.mapper.local_table, *(each.mapper.local_table for each in loaded)]
            tables += [each.secondary for each in loaded if each.secondary is not None]
            if any(_is_changed(table, target, cascade) for table in tables):
                self.expire(row)

    def complete(self) -> None:
        """Flush the pending changes. Reload expired objects for use after the unit."""
        if not self._unit._require_connection().has_orm_transaction:
            raise UnitStateError(
                "the transaction of uow.session's connection was committed or rolled back inside the unit: use "
                "rollback() or savepoint() of the unit instead"
            )
        self.flush()
        self._load(self.identity_map.all_states())

    def _load(self, states: Iterable[InstanceState[Any]]) -> None:
        """Load the columns of expired objects, and the relationships that the objects have lost."""
        expired: dict[tuple[Mapper[Any], frozenset[str]], list[Any]] = {}
        for state in states:
            related = _related(state.mapper).intersection(state.dict.get(_VALUES, ())).difference(state.dict)
            if related or state.expired_attributes.intersection(state.mapper.column_attrs.keys()):
                expired.setdefault((state.mapper, related), []).append(state.identity)
        for (mapper, related), keys in expired.items():
            options = [selectinload(mapper.attrs[each].class_attribute) for each in related]
            query = select(mapper).options(*options).execution_options(autoflush=False)
            for start in range(0, len(keys), _ROWS_AT_ONCE):
                found = query.where(tuple_(*mapper.primary_key).in_(keys[start : start + _ROWS_AT_ONCE]))
                self.scalars(found).unique().all()


@contextmanager
def _remembered(instance: object) -> Iterator[None]:
    """Before the block, remember the values of an object, and of the objects that SQLAlchemy expires with the object.
    After the block, restore the values of related objects that are not in the session.
    """
    state = inspect(instance)
    related = [each for _, _, each, _ in state.mapper.cascade_iterator("refresh-expire", state)]
    for each in (state, *related):
        _remember(each)
    yield
    for each in related:
        if not each.persistent:
            _restore(each)


def _remember(state: InstanceState[Any]) -> None:
    """Keep the loaded values of an object in the object. If the session kept the values, the values would keep related
    objects in memory.
    """
    if state.key is None:
        return
    values = state.dict.pop(_VALUES, {})
    values.update((name, state.dict[name]) for name in state.manager if name in state.dict)
    state.dict[_VALUES] = values


def _restore(state: InstanceState[Any]) -> None:
    """Give an object its remembered values, except for attributes with newer values."""
    values, related = state.dict.pop(_VALUES, {}), _related(state.mapper)
    for key in related.union(state.mapper.column_attrs.keys()).intersection(values).difference(state.dict):
        value = values[key]
        if key in related and state.mapper.relationships[key].uselist:
            value = list(collection_adapter(value))
            for each in value:
                _restore_columns(instance_state(each))  # a collection can use a column as its key
        set_committed_value(state.obj(), key, value)


def _restore_columns(state: InstanceState[Any]) -> None:
    values = state.dict.get(_VALUES, {})
    for key in set(state.mapper.column_attrs.keys()).intersection(values).difference(state.dict):
        set_committed_value(state.obj(), key, values[key])


@cache
def _related(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the names of the relationships that load objects."""
    return frozenset(each.key for each in mapper.relationships if each.lazy not in ("dynamic", "write_only"))


@event.listens_for(UnitSession, "after_rollback")
def _after_rollback(session: UnitSession) -> None:
    """Roll back the unit if the session has rolled back the whole transaction. If the session has rolled back a
    savepoint, drop the callbacks of the savepoint's block. Remember the values of the objects that SQLAlchemy expires
    next.
    """
    session._unit._end_after_rollback()
    nested, callbacks = session.get_nested_transaction(), session._unit._after_commit
    if nested is not None and callbacks is not None:
        del callbacks[session._callbacks[nested] :]
    session._remember_all()


@event.listens_for(UnitSession, "deleted_to_detached")
@event.listens_for(UnitSession, "persistent_to_deleted")
@event.listens_for(UnitSession, "persistent_to_detached")
@event.listens_for(UnitSession, "persistent_to_transient")
def _keep_usable(session: UnitSession, instance: object | None) -> None:
    """Restore the values of an object that leaves the session, or whose row was deleted."""
    if instance is None:
        return  # the application has dropped the object
    state = instance_state(instance)
    _restore(state)
    if state.key is None:
        make_transient(instance)  # if the row was deleted too, SQLAlchemy would not store the object again


@event.listens_for(UnitSession, "deleted_to_persistent")
def _remember_restored(session: UnitSession, instance: object | None) -> None:
    """Remember the values of an object that a rollback restores. SQLAlchemy expires the object next."""
    if instance is not None:
        _remember(instance_state(instance))


@event.listens_for(UnitSession, "after_soft_rollback")
def _after_soft_rollback(session: UnitSession, ended: SessionTransaction) -> None:
    """Expire the objects that the block has deleted. SQLAlchemy has restored the objects after `_after_rollback()`."""
    session.expire_all()


@event.listens_for(UnitSession, "before_attach")
def _before_attach(session: UnitSession, instance: object) -> None:
    """If the session has an object with the key of a new object, check whether the row still exists."""
    state = instance_state(instance)
    key = state.key or state.mapper.identity_key_from_instance(instance)
    if key in session.identity_map:
        with session.no_autoflush:
            session.get(state.mapper, key[1])  # if the row does not exist, SQLAlchemy marks the object as deleted


@event.listens_for(UnitSession, "after_flush")
def _after_flush(session: UnitSession, context: object) -> None:
    """If a new object has got the key of a deleted row from the database, mark the row's object as deleted."""
    for row in session.new:
        old = session.identity_map.get(instance_state(row).mapper.identity_key_from_instance(row))
        if old is not None and instance_state(old).expired:
            session._remove_newly_deleted([instance_state(old)])


def _is_changed(table: Any, target: str, cascade: str | None) -> bool:
    """Return True if a statement can change the table (see `Compiled.cascade`)."""
    # A trigger deletes the keys of a deleted device.
    if table.fullname == target or (table.fullname, target, cascade) == ("idempotency_keys", "devices", "ondelete"):
        return True
    return cascade is not None and any(
        getattr(key, cascade) not in (None, "NO ACTION", "RESTRICT")
        and key.column.table is not table
        and _is_changed(key.column.table, target, cascade)
        for key in getattr(table, "foreign_keys", ())
    )
