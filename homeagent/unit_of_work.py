"""One transaction: its stores, its savepoints, its ORM session on demand, and what runs once it is durable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from pydantic import JsonValue

from homeagent.callables import check_function, refuse_coroutine
from homeagent.canonical_json import fingerprint_of
from homeagent.clock import Clock, system_clock
from homeagent.engine.statements import Parameters, Row, Statement
from homeagent.errors import EffectFailedError, HomeAgentError, UnitStateError
from homeagent.frame_locals import clear_locals, clears_locals
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.types import check_timestamp
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore

if TYPE_CHECKING:
    from sqlmodel import Session

    from homeagent.engine.connection import StoreConnection
    from homeagent.engine.engine import Engine

__all__ = ["UnitOfWork", "UnitSettings", "call_back", "read_clock", "refuse_nesting"]

R = TypeVar("R")

_NO_COROUTINE = "do in it what is in this database, and await outside of the unit"

logger = logging.getLogger("homeagent")


class UnitSettings:
    """What the units of one database share.

    Args:
        engine: where the links come from.
        clock: read once per store method.
        timeout: how long a unit waits for its lane, in seconds.
    """

    __slots__ = ("clock", "engine", "memory", "timeout", "writing")

    def __init__(self, engine: Engine, clock: Clock, timeout: float) -> None:
        self.engine = engine
        self.clock = clock
        self.timeout = timeout
        self.memory: dict[str, Any] = {}
        self.writing: set[int] = set()


def read_clock(clock: Clock) -> datetime:
    """Read a clock: a timestamp in UTC, floored to milliseconds."""
    # The default clock returns such a timestamp by itself.
    return clock() if clock is system_clock else check_timestamp(clock(), "the clock's instant")


def call_back(callbacks: Iterable[Callable[[], object]]) -> None:
    """Call what a unit left to be called after its commit."""
    for callback in callbacks:
        try:
            callback()
        except Exception:
            # The commit stands and must not be hidden, so a callback's failure can only be told.
            logger.exception(
                "an after_commit callback failed; the commit stands", extra={"event": "after_commit_failed"}
            )


def refuse_nesting() -> NoReturn:
    """Raise the error for a thread that asks for a second write unit: it would wait for itself."""
    raise UnitStateError(
        "this thread has a write unit open already: pass that one on, or end it first; "
        "to undo a part of it use savepoint()"
    )


class UnitOfWork:
    """One transaction. It commits when its block ends cleanly, and rolls everything back on any exception.

    Get one from `Database.unit_of_work`; it is of no use before its `with` block and after it.

    Attributes:
        devices, agents, sessions, nonces, idempotency_keys: the stores, bound to this unit.
    """

    __slots__ = (
        "_after_commit",
        "_connection",
        "_owner",
        "_savepoints",
        "_session",
        "_settings",
        "_state",
        "_timeout",
        "read_only",
    )

    def __init__(self, settings: UnitSettings, *, read_only: bool, timeout: float | None = None) -> None:
        self._settings = settings
        self._timeout = settings.timeout if timeout is None else timeout
        self.read_only = read_only
        self._state = "new"
        self._connection: StoreConnection | None = None
        self._session: Session | None = None
        self._after_commit: list[Callable[[], object]] | None = None
        self._savepoints = 0
        self._owner = 0

    # Its life

    def __enter__(self) -> Self:
        if self._state != "new":
            raise UnitStateError("this unit of work was used before: open another one with unit_of_work()")
        settings = self._settings
        if not self.read_only:
            self._owner = get_ident()
            if self._owner in settings.writing:
                settings.engine.pool(read_only=False)  # in a forked child that is what is wrong
                refuse_nesting()
        try:
            if not self.read_only:
                settings.writing.add(self._owner)
            self._connection = settings.engine.begin(read_only=self.read_only, timeout=self._timeout)
        except BaseException as error:
            settings.engine.counters.faulted(error)
            settings.writing.discard(self._owner)
            raise
        self._state = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is None:
            return
        if kind is None and self._state == "open":
            self._commit()
            if self._after_commit is not None:
                call_back(self._after_commit)
        else:
            self._roll_back(error)

    def _commit(self) -> None:
        connection = self._connection
        if connection is None or self._state != "open":
            connection = self._require_connection()
        counters = self._settings.engine.counters
        sound = False
        try:
            if self._session is not None:
                self._session.flush()
            connection.commit()
            sound = True
        except BaseException as error:
            counters.faulted(error)
            counters.rollbacks += 1
            sound = self._undo(connection)
            raise
        finally:
            self._end(connection, sound=sound)
        if self.read_only:
            counters.reads += 1
        else:
            counters.commits += 1

    def _roll_back(self, error: BaseException | None) -> None:
        # Once more where `rollback` came before: that is harmless, and the link is given back either way.
        connection = self._connection
        if connection is None:
            return
        counters = self._settings.engine.counters
        if error is not None:
            counters.faulted(error)
        if self.read_only:
            counters.reads += 1
        else:
            counters.rollbacks += 1
        sound = False
        try:
            sound = self._undo(connection)
        finally:
            self._end(connection, sound=sound)

    def _undo(self, connection: StoreConnection) -> bool:
        """Roll back, and tell whether the link is still of use. The engine undoes what a lost link had begun."""
        if connection.is_lost:
            return False
        try:
            connection.rollback()
        except HomeAgentError as error:
            logger.warning(
                "rolling back failed, so the connection is closed: %s",
                error,
                extra={"event": "rollback_failed", "error": type(error).__name__},
            )
            return False
        return True

    def _end(self, connection: StoreConnection, *, sound: bool) -> None:
        self._state = "ended"
        self._connection = None
        settings = self._settings
        engine = settings.engine
        pool = engine.readers if self.read_only else engine.writers
        try:
            if self._session is not None:
                self._session.close()
        finally:
            try:
                # In a forked child, a thread that is not there may hold the lanes' mutex.
                if engine.is_forked_copy:
                    pass
                elif sound and not connection.needs_reconnect:
                    try:
                        pool.release(connection)
                    except BaseException:
                        pool.release_own(connection)
                        raise
                else:
                    pool.discard(connection)
                    if connection.needs_reconnect:
                        engine.discard_free()
            finally:
                # Only now: a signal's handler that asks for a unit in between is refused, and waits for its own thread
                # otherwise.
                if not self.read_only:
                    settings.writing.discard(self._owner)

    def _require_connection(self) -> StoreConnection:
        connection = self._connection
        if connection is None or self._state != "open":
            if self._state == "rolled back" and connection is not None:
                raise UnitStateError("this unit of work was rolled back: leave its block, and open another one")
            raise UnitStateError("this unit of work is over, or was never entered: use it inside its with block")
        return connection

    # What its owner does

    def rollback(self) -> None:
        """Abandon the unit: everything is undone now, and leaving the block then commits nothing. Twice is fine.

        Raises:
            UnitStateError: it is over already.
        """
        if self._state == "rolled back":
            return
        connection = self._require_connection()
        self._after_commit = None
        if self._session is not None:
            self._session.close()
        connection.rollback()
        self._state = "rolled back"

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo only what was done inside this block when an exception leaves it; the exception goes on its way."""
        connection = self._require_connection()
        self._savepoints += 1
        name = f"homeagent_{self._savepoints}"
        callbacks = len(self._after_commit or ())
        nested = None
        if self._session is not None:
            nested = self._session.begin_nested()
            # SQLAlchemy sends SAVEPOINT when the session first needs the connection, and a store may come before.
            self._session.connection()
        else:
            connection.savepoint(name)
        try:
            yield
            self._require_connection()
            if nested is not None:
                nested.commit()
            elif self._session is not None:
                self._session.flush()
        except BaseException:
            if self._state == "open":
                if nested is not None:
                    nested.rollback()
                else:
                    if self._session is not None:
                        # It was opened in here: what it holds may be undone with the rest.
                        self._session.expunge_all()
                    connection.rollback_to_savepoint(name)
                if self._after_commit is not None:
                    del self._after_commit[callbacks:]
            raise
        if nested is None:
            connection.release_savepoint(name)

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once, in order, when the commit is durable; never after a rollback.

        One that raises is logged, and neither undoes nor hides the commit.

        Raises:
            UnitStateError: the unit is over already.
            InvalidArgumentError: it can't be called, or is a coroutine function.
        """
        self._require_connection()
        check_function(callback, "callback", coroutine="await it after the unit")
        if self._after_commit is None:
            self._after_commit = []
        self._after_commit.append(callback)

    @property
    def session(self) -> Session:
        """The ORM session of this unit, opened on the first call, on the same connection and transaction.

        It is flushed before a store's statement and expired after a store's write, so both see one truth. Its
        `commit()` only flushes; its `rollback()` ends the unit. After the unit's end it raises UnitStateError too.
        """
        connection = self._require_connection()
        if self._session is None:
            # SQLModel's session costs an import that a unit without one never pays.
            from sqlalchemy import event
            from sqlmodel import Session

            unit = self

            class UnitSession(Session):
                def get_bind(self, *args: Any, **kwargs: Any) -> Any:
                    # Asked for before every statement. The connection outlives the unit, and may be another's by then.
                    unit._require_connection()
                    return super().get_bind(*args, **kwargs)

                def rollback(self) -> None:
                    # SQLAlchemy's own does nothing while the session has done nothing; the unit may have.
                    super().rollback()
                    unit._on_session_rollback(self, whole=True)

            session = UnitSession(
                bind=connection.orm_connection(), join_transaction_mode="rollback_only", info={"now": self.now}
            )
            event.listen(session, "after_rollback", self._on_session_rollback)
            self._session = session
        return self._session

    def _on_session_rollback(self, session: Any, *, whole: bool = False) -> None:
        connection = self._connection
        if self._state != "open" or connection is None:
            return
        if connection.in_transaction:
            if not whole:
                # Only a savepoint was undone.
                return
            connection.rollback()
        self._state = "rolled back"
        self._after_commit = None

    @clears_locals
    def run_once(
        self,
        scope: IdempotencyScope,
        effect: Callable[[Attempt], JsonValue],
        *,
        params: JsonValue = None,
        ttl: timedelta = timedelta(hours=24),
    ) -> Outcome:
        """Run an effect that is only in this database once: key, effect and result are one commit.

        Args:
            scope: what makes it the same call.
            effect: is given the attempt, works on this unit, and returns any JSON value.
            params: the call's parameters; the same key with other ones is refused.
            ttl: how long the outcome is replayed.

        Raises:
            InvalidArgumentError: a bad argument, a coroutine function among them.
            FingerprintMismatchError, IdempotencyInProgressError, OutcomeUnknownError, EffectFailedError: as in
                `IdempotencyKeyStore.claim`. Whatever the effect raises undoes it and frees the key, except that an
                EffectFailedError is stored where the caller catches it inside the unit and lets that commit.
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

    # The stores. A unit that kept one would be in a reference cycle with it, which only the garbage collector ends.

    @property
    def devices(self) -> DeviceStore:
        """Who may enter."""
        return DeviceStore(self)

    @property
    def agents(self) -> AgentStore:
        """Who answers."""
        return AgentStore(self)

    @property
    def sessions(self) -> SessionStore:
        """The index of sessions."""
        return SessionStore(self)

    @property
    def nonces(self) -> NonceStore:
        """Replay protection."""
        return NonceStore(self)

    @property
    def idempotency_keys(self) -> IdempotencyKeyStore:
        """The records that make a retried call safe."""
        return IdempotencyKeyStore(self)

    # What a store asks of it

    def one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Return what the first row of a store's statement stands for, None where there is none."""
        connection = self._connection
        if connection is None or self._state != "open":
            connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        try:
            return connection.one(statement, parameters)
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise

    def all(self, statement: Statement[R], **parameters: Any) -> list[R]:
        """Return what the rows of a store's statement stand for."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        try:
            return connection.all(statement, parameters)
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise

    def write(self, statement: Statement[Any], **parameters: Any) -> int:
        """Run a store's statement that changes rows, and return how many."""
        connection = self._connection
        if connection is None or self._state != "open":
            connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        try:
            return connection.write(statement, parameters)
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise
        finally:
            if self._session is not None:
                self._session.expire_all()

    def write_one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Run a store's statement that changes a row and returns it, and return what that stands for."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        try:
            return connection.one(statement, parameters)
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise
        finally:
            if self._session is not None:
                self._session.expire_all()

    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Run a store's statement once for each set of parameters, and return how many rows changed."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        try:
            return connection.write_many(statement, parameters)
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise
        finally:
            if self._session is not None:
                self._session.expire_all()

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows of values as they are stored: see `Link.insert_rows`."""
        connection = self._require_connection()
        if self._session is not None:
            self._session.flush()
        connection.insert_rows(table, columns, rows)

    def now(self) -> datetime:
        """Read the clock: an instant in UTC, floored to milliseconds."""
        return read_clock(self._settings.clock)

    @property
    def shared(self) -> dict[str, Any]:
        """What the stores of one `Database` remember between units."""
        return self._settings.memory

    @property
    def connection_memory(self) -> dict[str, Any]:
        """What the stores remember of this unit's connection, for as long as it is open."""
        return self._require_connection().memory
