"""Begin and end the transaction of a unit of work.

| from | to | when |
|---|---|---|
| NEW | OPEN | the `with` block is entered, the unit has got a connection, and the transaction has begun |
| NEW | OPEN | the unit has joined the transaction of a batch (`homeagent.group_commit`) |
| OPEN | ROLLED_BACK | the caller calls `rollback()`, or the ORM session rolls the whole transaction back |
| OPEN | FINISHED | the `with` block has ended, and the transaction was committed, or rolled back after an exception |
| ROLLED_BACK | FINISHED | the `with` block has ended, and the unit has released the connection |
| OPEN, ROLLED_BACK | FINISHED | the unit has left the transaction of the batch |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from homeagent.clock import Clock, system_clock
from homeagent.errors import HomeAgentError, UnitStateError
from homeagent.models.limits import Limits
from homeagent.models.types import check_flag, check_timestamp

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

    from homeagent.engine.connection import StoreConnection
    from homeagent.engine.engine import Engine
    from homeagent.engine.statements import Parameters, Statement
    from homeagent.orm_session import UnitSession
    from homeagent.unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger("homeagent")


class UnitState(Enum):
    """State of a unit (see the module's docstring)."""

    NEW = auto()
    OPEN = auto()
    ROLLED_BACK = auto()
    FINISHED = auto()


# Python reads the global name `OPEN` faster than `UnitState.OPEN`.
NEW, OPEN, ROLLED_BACK, FINISHED = UnitState

SAVEPOINT = "homeagent_group"
"""Savepoint of a unit that has joined the transaction of a batch."""
_BEGIN_SAVEPOINT = f"SAVEPOINT {SAVEPOINT}"
_RELEASE_SAVEPOINT = f"RELEASE SAVEPOINT {SAVEPOINT}"


@dataclass(slots=True, eq=False)
class UnitSettings:
    """Settings and state that all units of one database share. The timeout is in seconds."""

    engine: Engine
    clock: Clock
    timeout: float
    unit: type[UnitOfWork]
    limits: Limits
    grants: dict[tuple[str, str, int], Iterator[int]] = field(default_factory=dict)
    """Rows that the stores can still add before the next count (see `homeagent.stores.room`)."""
    writing: dict[int, Transaction] = field(default_factory=dict)
    """The open write unit of each thread. The key is the id of the thread."""

    def now(self) -> datetime:
        """Return the clock's timestamp in UTC, rounded down to milliseconds. After the end, raise UnitStateError."""
        clock = self.clock
        # The default clock already returns a timestamp in UTC in whole milliseconds.
        return clock() if clock is system_clock else check_timestamp(clock(), "the clock's instant")


def call_back(callbacks: Iterable[Callable[[], object]]) -> None:
    """Call the callbacks of a committed unit. Log an error of a callback, and continue."""
    for callback in callbacks:
        try:
            callback()
        except Exception:
            logger.exception(
                "an after_commit callback failed; the commit stands", extra={"event": "after_commit_failed"}
            )


def refuse_nesting(unit: Transaction) -> NoReturn:
    """Raise UnitStateError. A second write unit would wait for the thread's first write unit."""
    if unit._state is ROLLED_BACK:
        raise UnitStateError("this thread is in the block of a write unit that was rolled back: leave the block first")
    raise UnitStateError(
        "this thread already has an open write unit: use that unit or end it first; "
        "to be able to undo a part of a unit, use savepoint()"
    )


def current_task() -> object | None:
    """Return the asyncio task that runs in this thread, or None."""
    loop = asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


class Transaction:
    """Base class of `UnitOfWork`. If the unit joins a batch, the argument `joined=` is the batch's connection. The
    method `_leave()` ends such a unit. The timeout is in seconds, by default `settings.timeout`.
    """

    __slots__ = (
        "_after_commit",
        "_connection",
        "_has_joined",
        "_owner",
        "_run",
        "_savepoints",
        "_session",
        "_state",
        "_task",
        "_timeout",
        "read_only",
        "settings",
    )

    def __init__(
        self,
        settings: UnitSettings,
        read_only: bool,
        timeout: float | None = None,
        joined: StoreConnection | None = None,
    ) -> None:
        self.settings: UnitSettings = settings
        self._timeout = settings.timeout if timeout is None else timeout
        self.read_only: bool = check_flag(read_only, "read_only")
        self._state = NEW
        self._connection = joined
        # The connection's method `rows()`. The value is None without an open unit, or with an ORM session.
        self._run: Callable[[Statement[Any], Parameters], list[Any]] | None = None
        self._has_joined = joined is not None
        self._session: UnitSession | None = None
        self._after_commit: list[Callable[[], object]] | None = None
        # For each open savepoint, the nested transaction of the ORM session, or None (see `_keep_savepoints()`).
        self._savepoints: tuple[SessionTransaction | None, ...] = ()
        self._owner = 0
        self._task: object | None = None
        """The asyncio task that entered the write unit, or None."""
        if joined is not None:
            joined.execute(_BEGIN_SAVEPOINT)
            self._run, self._state = joined.rows, OPEN

    def __enter__(self) -> Self:
        if self._state is not NEW:
            raise UnitStateError("this unit of work was used before: open another one with unit_of_work()")
        settings = self.settings
        if not self.read_only:
            self._owner = get_ident()
            if (outer := settings.writing.get(self._owner)) is not None:
                # In a forked child, `pool()` raises DatabaseClosedError.
                settings.engine.pool(read_only=False)
                refuse_nesting(outer)
        try:
            if not self.read_only:
                self._task = current_task()
                settings.writing[self._owner] = self
            self._connection = connection = settings.engine.begin(self.read_only, self._timeout)
        except BaseException as error:
            settings.engine.counters.faulted(error)
            settings.writing.pop(self._owner, None)
            raise
        self._run = connection.rows
        self._state = OPEN
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection = self._connection
        if connection is None:
            return
        committed = False
        try:
            if error is not None:
                self.settings.engine.counters.faulted(error)
            elif self._state is OPEN:
                if self._session is not None:
                    self._session.complete()
                connection.commit()
                committed = True
        except BaseException as failure:
            self.settings.engine.counters.faulted(failure)
            raise
        finally:
            self._end(connection, committed)
        if committed and self._after_commit is not None:
            call_back(self._after_commit)

    def _undo(self, connection: StoreConnection) -> bool:
        """Roll back, and return True. If the connection is no longer usable, return False."""
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

    def _end(self, connection: StoreConnection, committed: bool) -> None:
        settings = self.settings
        engine = settings.engine
        pool = engine.readers if self.read_only else engine.writers
        sound = committed
        # End the unit before closing the session. A listener of the session could otherwise write in autocommit.
        self._state = FINISHED
        # An exception in the task's frames would keep the unit, and the unit the task.
        self._connection = self._run = self._task = None
        # The unit and the session form a reference cycle.
        session, self._session = self._session, None
        try:
            try:
                if not committed:
                    # After an earlier call of `rollback()`, a second ROLLBACK has no effect.
                    sound = self._undo(connection)
            finally:
                if session is not None:
                    session.close()
        finally:
            try:
                if engine.is_forked_copy:
                    pass  # during the fork, another thread can hold the pool's mutex
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
                if self.read_only:
                    engine.counters.reads += 1
                else:
                    # Do not discard the id before the release of the write lock. Without the id, a signal handler would
                    # wait for the write lock of its own thread.
                    settings.writing.pop(self._owner, None)
                    if committed:
                        engine.counters.commits += 1
                    else:
                        engine.counters.rollbacks += 1

    def _require_connection(self) -> StoreConnection:
        """Return the connection of the unit. If the unit is not open, raise UnitStateError."""
        connection = self._connection
        if connection is None or self._state is not OPEN:
            if self._state is ROLLED_BACK and connection is not None:
                raise UnitStateError("this unit of work was rolled back: leave its block, and open another one")
            raise UnitStateError("this unit of work has ended or was not entered: use it inside its with block")
        return connection

    def now(self) -> datetime:
        """Return the clock's timestamp in UTC, rounded down to milliseconds. After the end, raise UnitStateError."""
        if self._run is None:
            self._require_connection()
        return self.settings.now()

    def rollback(self) -> None:
        """Roll back now, and do not commit at the end of the block. A second call of `rollback()` has no effect.

        Raises:
            UnitStateError: if the unit has ended.
        """
        if self._state is ROLLED_BACK:
            return
        connection = self._require_connection()
        if self._session is not None:
            self._session.close()
        self._undo_changes(connection)

    def _undo_changes(self, connection: StoreConnection) -> None:
        """Roll back the unit, drop the callbacks, and set the state ROLLED_BACK."""
        if not self._has_joined:
            self._undo(connection)
        elif connection.in_transaction:
            connection.rollback_to_savepoint(SAVEPOINT)
            connection.end_orm()
        self._after_commit = self._run = None
        self._state = ROLLED_BACK

    def _end_after_rollback(self) -> None:
        """If the ORM session has rolled back the transaction, set the state ROLLED_BACK."""
        connection = self._connection
        if self._state is not OPEN or connection is None:
            return
        if not connection.has_orm_transaction:
            if self._session is not None:
                # Detach the objects, so that SQLAlchemy does not expire the objects.
                self._session.expunge_all()
            self._undo_changes(connection)

    def _leave(self, *, keep: bool) -> list[Callable[[], object]] | None:
        """End a unit in a batch. Return the callbacks, which the caller must call after the commit."""
        connection, self._connection = self._connection, None
        session, self._session, self._run = self._session, None, None
        is_open, self._state = self._state is OPEN, FINISHED
        if connection is None:
            return None
        if session is not None:
            try:
                connection.release_orm(keep=keep and is_open)
            finally:
                session.close()
        # If SQLite has rolled back the whole transaction, the savepoint no longer exists.
        if is_open and connection.in_transaction:
            if keep:
                connection.execute(_RELEASE_SAVEPOINT)
            else:
                connection.rollback_to_savepoint(SAVEPOINT)
        return self._after_commit if keep else None
