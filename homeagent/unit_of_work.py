"""A unit of work is a transaction with stores, savepoints, an optional ORM session, and callbacks after the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_origin, get_type_hints

from pydantic import JsonValue

from homeagent.callables import check_function, refuse_coroutine
from homeagent.canonical_json import fingerprint_of
from homeagent.engine.connection import StoreConnection
from homeagent.engine.statements import Parameters, Row, Statement
from homeagent.errors import EffectFailedError, InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
from homeagent.stores.store import Store
from homeagent.transaction import OPEN, SAVEPOINT, Transaction

if TYPE_CHECKING:
    from sqlmodel import Session

R = TypeVar("R")
U = TypeVar("U", bound="UnitOfWork")

_NO_COROUTINE = "use an ordinary function for the work in this database, and await outside the unit"


class UnitOfWork(Transaction):
    """One transaction. The unit is a context manager, which commits at the end of the block, or rolls back if an
    exception leaves the block.

    Get a unit from `Database.unit_of_work()`, and use the unit only inside its block.

    An application can derive a class with its own stores, and pass the class to `Database.open`. The derived class has
    a type annotation for each store, for example `messages: MessageStore`. Each access to such an attribute creates a
    new store object.

    Attributes:
        devices, agents, sessions, nonces, idempotency_keys: stores that are bound to this unit.
    """

    __slots__ = ()

    devices: DeviceStore
    agents: AgentStore
    sessions: SessionStore
    nonces: NonceStore
    idempotency_keys: IdempotencyKeyStore

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Return a context manager for a part of the unit. An exception that leaves the block undoes only the changes
        of the block.
        """
        connection = self._require_connection()
        self._savepoints += 1
        name = f"homeagent_{self._savepoints}"
        callbacks = len(self._after_commit or ())
        nested = None
        if self._session is not None:
            nested = self._session.begin_nested()
            # Send SAVEPOINT now, because a store can write before the session's first statement.
            self._session.connection()
        else:
            connection.execute(f"SAVEPOINT {name}")
        try:
            yield
            self._require_connection()
            if nested is not None:
                nested.commit()
            elif self._session is not None:
                self._session.flush()
        except BaseException:
            if self._state is OPEN:
                if nested is not None:
                    nested.rollback()
                else:
                    if self._session is not None:
                        # The block opened the ORM session. After the rollback, the session's objects can differ from
                        # the rows in the database.
                        self._session.expunge_all()
                    connection.rollback_to_savepoint(name)
                if self._after_commit is not None:
                    del self._after_commit[callbacks:]
            raise
        if nested is None:
            connection.execute(f"RELEASE SAVEPOINT {name}")

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Register a function that is called once after the commit. Several functions are called in the order of their
        registration. If the unit is rolled back, homeagent does not call the function.

        An exception of a callback is logged, and affects neither the commit nor the caller.

        Raises:
            UnitStateError: if the unit has ended.
            InvalidArgumentError: if the callback can't be called, or is a coroutine function.
        """
        self._require_connection()
        check_function(callback, "callback", coroutine="await it after the unit")
        if self._after_commit is None:
            self._after_commit = []
        self._after_commit.append(callback)

    @property
    def session(self) -> Session:
        """The ORM session of this unit. At the first use of the session, the unit opens the session in the unit's
        transaction.

        Before a store's statement, the unit flushes the session. If a store changes a table, the session reloads the
        affected objects at the next access. The session and the stores therefore see the same data. The session's
        method `commit()` only flushes, and its method `rollback()` rolls back the unit. After the end of the unit, the
        session raises UnitStateError, but the application can still use the session's objects.
        """
        connection = self._require_connection()
        if self._session is None:
            # Import the session's class lazily, because most units use no session.
            from homeagent.orm_session import UnitSession

            if self._has_joined:
                # A rollback of the session must not undo the other units of the batch.
                connection.driver_connection.confine(SAVEPOINT)
            self._session, self._run = UnitSession(self, connection), None
        return self._session

    @clears_locals
    def run_once(
        self,
        scope: IdempotencyScope,
        effect: Callable[[Attempt], JsonValue],
        *,
        params: JsonValue = None,
        ttl: timedelta = timedelta(hours=24),
    ) -> Outcome:
        """Run an effect on this database once. One commit contains the key, the changes of the effect and its result.

        If the effect raises an exception, the unit undoes the changes of the effect, and the key is free again. To
        store an `EffectFailedError` as the outcome, catch the error inside the unit, and let the unit commit.

        Args:
            scope: identity of the call.
            effect: function that gets the attempt, uses this unit and returns any JSON value.
            params: parameters of the call. A later call with the same key must have equal parameters.
            ttl: time for which a retry of the call returns the stored outcome.

        Raises:
            InvalidArgumentError: if an argument is invalid, for example if the effect is a coroutine function.
            FingerprintMismatchError, IdempotencyInProgressError, OutcomeUnknownError, EffectFailedError: in the same
                cases as `IdempotencyKeyStore.claim()`.
        """
        check_function(effect, "effect", coroutine=_NO_COROUTINE)
        fingerprint = fingerprint_of(params)
        failure: EffectFailedError | None = None
        with self.savepoint():
            claimed = self.idempotency_keys.claim(scope, fingerprint=fingerprint, lease=timedelta(0), ttl=ttl)
            if isinstance(claimed, Outcome):
                return claimed
            try:
                with self.savepoint():
                    value = refuse_coroutine(effect(claimed), "the effect", _NO_COROUTINE)
            except EffectFailedError as error:
                self.idempotency_keys.fail(claimed, error.detail)
                failure = error
            else:
                stored = self.idempotency_keys.complete(claimed, value)
        if failure is not None:
            raise failure
        return Outcome(value=value, replayed=False, attempt=claimed.number, omitted=not stored)

    # Methods that the stores call

    def one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Run a store's statement, and return the object of the first row, or None if there is no row."""
        rows = (self._run or self._run_after_flush)(statement, parameters)
        return rows[0] if rows else None

    def all(self, statement: Statement[R], **parameters: Any) -> list[R]:
        """Run a store's statement, and return the objects of all rows."""
        return (self._run or self._run_after_flush)(statement, parameters)

    def write(self, statement: Statement[Any], **parameters: Any) -> int:
        """Run a store's statement that writes, and return the number of changed rows."""
        (self._run or self._run_after_flush)(statement, parameters)
        return self._connection.changes()  # type: ignore[union-attr]  # the statement has required the connection

    def write_one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Run a store's statement with RETURNING. Return the object of the first row, or None if there is no row."""
        rows = (self._run or self._run_after_flush)(statement, parameters)
        return rows[0] if rows else None

    @clears_locals
    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Run a writing statement of a store once for each set of parameters, and return the number of changed rows."""
        changed: int = self._run_after_flush(statement, parameters, StoreConnection.write_many)
        return changed

    def _run_after_flush(
        self,
        statement: Statement[Any],
        parameters: Any,
        run: Callable[[StoreConnection, Statement[Any], Any], Any] = StoreConnection.rows,
    ) -> Any:
        """Run a statement in a unit that can have an ORM session. If the unit is not open, raise UnitStateError."""
        connection = self._require_connection()
        session = self._session
        if session is not None:
            session.flush()
        try:
            return run(connection, statement, parameters)
        finally:
            if session is not None:
                session.expire_written(statement)

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows of stored values (see `StoreConnection.insert_rows`)."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        connection.insert_rows(table, columns, rows)

    @property
    def connection_memory(self) -> dict[str, Any]:
        """Dictionary in which the stores keep values until the unit's connection is closed."""
        return self._require_connection().memory


# Each access to an attribute creates a store. Do not keep the store in the unit, because the unit and the store would
# form a reference cycle. Use the store's class as the property's getter, because a getter function is slower.
for _name, _store in get_type_hints(UnitOfWork).items():
    setattr(UnitOfWork, _name, property(_store, doc=_store.__doc__))


def add_stores(kind: type[U]) -> type[U]:
    """Add a property for each store that a subclass of `UnitOfWork` annotates, and return the class."""
    if not isinstance(kind, type) or not issubclass(kind, UnitOfWork):
        raise InvalidArgumentError("unit must be a subclass of UnitOfWork")
    own = [base for base in kind.__mro__ if not issubclass(UnitOfWork, base)]
    try:
        # The function `get_type_hints()` also returns the annotations of `UnitOfWork`.
        names = {name for base in own for name in get_annotations(base)}
        types = get_type_hints(kind) if names else {}
    except NameError as error:
        raise InvalidArgumentError(
            f"an annotation of {kind.__qualname__} can't be evaluated: {error}. Import the store outside of "
            "TYPE_CHECKING, and define it in a module"
        ) from None
    for name in sorted(names):
        store = types[name]
        if get_origin(store) is ClassVar or store is ClassVar:
            continue
        if hasattr(UnitOfWork, name):
            raise InvalidArgumentError(f"{kind.__qualname__}.{name} hides UnitOfWork.{name}: choose another name")
        if not isinstance(store, type) or not issubclass(store, Store):
            raise InvalidArgumentError(
                f"{kind.__qualname__}.{name} must be annotated with a subclass of homeagent.Store, not {store!r}"
            )
        setattr(kind, name, property(store, doc=store.__doc__))
    return kind
