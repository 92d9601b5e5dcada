"""A unit of work is a transaction with stores, savepoints and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_origin, get_type_hints

from pydantic import JsonValue

from homeagent.callables import check_function, refuse_deferred
from homeagent.canonical_json import fingerprint_of
from homeagent.engine.connection import StoreConnection
from homeagent.engine.statements import Parameters, Row, Statement, no_statement
from homeagent.errors import (
    ConnectionLostError,
    EffectFailedError,
    HomeAgentError,
    InvalidArgumentError,
    UnitStateError,
)
from homeagent.frame_locals import clears_locals
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
from homeagent.stores.store import Store
from homeagent.transaction import OPEN, ROLLED_BACK, SAVEPOINT, Transaction

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction
    from sqlmodel import Session

R = TypeVar("R")
U = TypeVar("U", bound="UnitOfWork")

_NO_COROUTINE = "use an ordinary function for the work in this database, and await outside the unit"


class UnitOfWork(Transaction):
    """One transaction, as a context manager. The unit commits at the end of the block. If an exception leaves the
    block, the unit rolls back.

    Get a unit from `Database.unit_of_work()`. Use the unit only inside its block, and in one thread at a time.

    An application can pass a subclass with more stores to `Database.open`. The subclass annotates each store, for
    example `messages: MessageStore`. Each access to such an attribute creates a store.

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
        of the block. On PostgreSQL, the exception also releases the locks of rows that were first read in the block.
        """
        connection = self._require_connection()
        session = self._session
        depth = len(self._savepoints)
        name = f"homeagent_{depth}"
        callbacks = len(self._after_commit or ())
        if session is None:
            connection.execute(f"SAVEPOINT {name}")
        self._savepoints += (None if session is None else session.begin_nested(),)
        try:
            yield
            if self._state is ROLLED_BACK:
                return
            self._require_connection().require_transaction()
            if (nested := self._nested_transaction(depth)) is not None:
                nested.commit()
        except BaseException:
            # After an error such as a full disk, SQLite can have rolled back the whole transaction.
            if self._state is OPEN and connection.in_transaction:
                # A failed ROLLBACK must not replace the exception, for example a Ctrl-C, which `run()` must not retry.
                with suppress(ConnectionLostError):
                    if (nested := self._nested_transaction(depth)) is not None:
                        nested.rollback()
                    if session is None:
                        connection.rollback_to_savepoint(name)
                    if self._after_commit is not None:
                        del self._after_commit[callbacks:]
                    self._keep_savepoints(depth)
            raise
        if session is None:
            connection.execute(f"RELEASE SAVEPOINT {name}")
        self._keep_savepoints(depth)

    def _nested_transaction(self, number: int) -> SessionTransaction | None:
        """Return the ORM session's nested transaction of an open savepoint, or None without an ORM session."""
        if number >= len(self._savepoints):
            raise UnitStateError("an outer savepoint of this unit was left first: leave the inner savepoint first")
        return self._savepoints[number]

    def _keep_savepoints(self, number: int) -> None:
        """Forget the inner savepoints. If the innermost remaining savepoint is older than the ORM session, begin a
        nested transaction. Otherwise a failed flush would undo the whole unit.
        """
        kept = self._savepoints[:number]
        if self._session is not None and kept and kept[-1] is None:
            kept = (*kept[:-1], self._session.begin_nested())
        self._savepoints = kept

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Register a function that is called once after the commit. Several functions are called in the order of
        registration. After a rollback, homeagent does not call the function.

        An exception of a callback is only logged. The unit stays committed.

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
        """The ORM session of this unit, in the unit's transaction.

        Before a store's statement, the unit flushes the session. After a store's change or an undone savepoint, the
        session reloads affected objects at the next access. The session and the stores therefore see the same data. The
        session's `commit()` only flushes. The session's `rollback()` rolls back the unit. The session's
        `begin_nested()` also undoes changes of the stores. After the unit or its rollback, the session and its
        `connection()` raise UnitStateError. The connection's `commit()` also raises UnitStateError, and the unit then
        stores nothing. The session's objects stay usable after the unit.
        """
        connection = self._require_connection()
        if self._session is None:
            # Import the session's class lazily, because most units use no session.
            from homeagent.orm_session import UnitSession

            self._session, self._run = UnitSession(self, connection), None
            if self._has_joined:
                # The session's rollback must not undo other units of the batch.
                connection.driver_connection.confine(SAVEPOINT)
            self._keep_savepoints(len(self._savepoints))
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
        """Run an effect on this database once. One commit contains the key, the effect's changes and the result.

        An exception of the effect undoes the effect's changes and frees the key. To store an `EffectFailedError` as the
        outcome, catch the error inside the unit.

        Args:
            scope: identity of the call.
            effect: function that gets the attempt, uses this unit and returns any JSON value.
            params: parameters of the call. A later call with the same key must have equal parameters.
            ttl: time for which a retry of the call returns the stored outcome.

        Raises:
            InvalidArgumentError: if an argument is invalid, for example a coroutine function.
            FingerprintMismatchError, IdempotencyInProgressError, OutcomeUnknownError, EffectFailedError: in the same
                cases as `IdempotencyKeyStore.claim()`.
        """
        check_function(effect, "effect", coroutine=_NO_COROUTINE)
        fingerprint = fingerprint_of(params)
        failure: EffectFailedError | None = None
        with self.savepoint():
            # Only the effect itself can find the claim before the outcome: other units wait for this unit.
            claimed = self.idempotency_keys.claim(scope, fingerprint=fingerprint, lease=timedelta(hours=1), ttl=ttl)
            if isinstance(claimed, Outcome):
                return claimed
            try:
                with self.savepoint():
                    value = refuse_deferred(effect(claimed), "the effect", _NO_COROUTINE)
            except EffectFailedError as error:
                self.idempotency_keys.fail(claimed, error.detail)
                failure = error
            else:
                stored = self.idempotency_keys.complete(claimed, value)
        if failure is not None:
            raise failure
        return Outcome(value=value, replayed=False, attempt=claimed.number, omitted=not stored)

    # Methods that the stores call

    def one(self, statement: Statement[R], /, **parameters: Any) -> R | None:
        """Run a store's statement. Return the first row's object, or None without rows."""
        rows = (self._run or self._run_after_flush)(statement, parameters)
        return rows[0] if rows else None

    def all(self, statement: Statement[R], /, **parameters: Any) -> list[R]:
        """Run a store's statement, and return the objects of all rows."""
        return (self._run or self._run_after_flush)(statement, parameters)

    def write(self, statement: Statement[Any], /, **parameters: Any) -> int:
        """Run a store's statement that writes, and return the number of changed rows."""
        (self._run or self._run_after_flush)(statement, parameters)
        return self._connection.changes()  # type: ignore[union-attr]  # the statement has required the connection

    def write_one(self, statement: Statement[R], /, **parameters: Any) -> R | None:
        """Run a store's statement, and return the first returned row's object. Without `returning=`, return None."""
        rows = (self._run or self._run_after_flush)(statement, parameters)
        return rows[0] if rows else None

    @clears_locals
    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Run a store's statement for each set of parameters. Return the number of changed rows. After an error, no row
        is changed.
        """
        with self.savepoint():
            changed: int = self._run_after_flush(statement, parameters, StoreConnection.write_many)
        return changed

    def _run_after_flush(
        self,
        statement: Statement[Any],
        parameters: Any,
        run: Callable[[StoreConnection, Statement[Any], Any], Any] = StoreConnection.rows,
    ) -> Any:
        """Run a statement in a unit that can have an ORM session. If the unit is not open, raise UnitStateError."""
        try:
            if not isinstance(statement, Statement):
                raise no_statement(statement)
            connection = self._require_connection()
            session = self._session
            if session is not None:
                connection.orm_connection()  # SQLite can have rolled back the unit in a statement of the session
                session.flush()
        except HomeAgentError:
            if isinstance(parameters, dict):
                parameters.clear()  # a traceback could show the values
            raise
        try:
            return run(connection, statement, parameters)
        except BaseException:
            connection.close_interrupted()
            raise
        finally:
            if session is not None and (compiled := statement.compiled(connection.dialect)).writes:
                session.expire_written(compiled.target, compiled.cascade)

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows of stored values (see `StoreConnection.insert_rows`)."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        connection.insert_rows(table, columns, rows)
        if self._session is not None:
            self._session.expire_written(table, None)

    @property
    def connection_memory(self) -> dict[str, Any]:
        """Dictionary for values that the stores keep until the connection is closed."""
        return self._require_connection().memory


# Each access to an attribute creates a store. Do not keep the store in the unit, because of the reference cycle. The
# property calls the store's class directly, because a function in between would be slower.
for _name, _store in get_type_hints(UnitOfWork).items():
    setattr(UnitOfWork, _name, property(_store, doc=_store.__doc__))


def add_stores(kind: type[U]) -> type[U]:
    """Add a property for each store that the class annotates. Return the class."""
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
