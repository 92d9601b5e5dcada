"""Base class of the engines. An engine has separate pools of connections for writing and reading."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from homeagent.engine.connection import StoreConnection
from homeagent.engine.counters import Counters
from homeagent.engine.driver_errors import translated
from homeagent.engine.fork import register
from homeagent.errors import ConnectionLostError, DatabaseBusyError, DatabaseClosedError, DatabaseMovedError
from homeagent.pool import ConnectionPool

if TYPE_CHECKING:
    import sqlalchemy

    from homeagent.engine.files.file_identity import FileIdentityCheck
    from homeagent.engine.statements import Parameters, Statement
    from homeagent.errors import HomeAgentError

R = TypeVar("R")

READ_CONNECTIONS = 2
"""Maximum number of connections that `Database.read_connection` lends at once."""


class Engine:
    """One open database."""

    connection_type: type[StoreConnection] = StoreConnection
    shares_commits = False
    """True if concurrent units share a commit (see `homeagent.group_commit`)."""
    begin_write: Sequence[str]
    """SQL statements that begin a write unit."""
    begin_read: Sequence[str]
    """SQL statements that begin a read-only unit."""
    driver_errors: tuple[type[BaseException], ...]
    """Exceptions of the driver that the method `translate()` accepts."""
    identity_check: FileIdentityCheck | None = None
    """Check of the database's file. None for a server."""

    def __init__(self, sa_engine: sqlalchemy.Engine, *, writers: int, readers: int) -> None:
        self.sa_engine = sa_engine
        self.application_metadata: tuple[sqlalchemy.MetaData, ...] = ()
        """Metadata of the application's tables that do not derive from `homeagent.Table`."""
        self.acknowledged: frozenset[str] = frozenset()
        """Names of the application's triggers on homeagent's tables."""
        self._connections: weakref.WeakSet[StoreConnection] = weakref.WeakSet()
        self.counters: Counters = Counters()
        waited = self.counters.waited
        self.writers: ConnectionPool[StoreConnection] = ConnectionPool(
            writers,
            lambda: self._connection(read_only=False),
            name="the write lock" if writers == 1 else "a connection to write",
            waited=waited,
        )
        self.readers: ConnectionPool[StoreConnection] = ConnectionPool(
            readers, lambda: self._connection(read_only=True), name="a connection to read", waited=waited
        )
        self.read_connections: ConnectionPool[sqlalchemy.Connection] = ConnectionPool(
            READ_CONNECTIONS, self.open_read_connection, name=f"one of the {READ_CONNECTIONS} read connections"
        )
        self.feed_connections: ConnectionPool[StoreConnection] = ConnectionPool(
            1, lambda: self._connection(read_only=True), name="the connection that reads device changes"
        )
        self.feed_mutex: threading.RLock = threading.RLock()
        """Mutex for the use of the connection in `feed_connections`."""
        self._closed = False
        self.is_forked_copy = False
        """True if a fork copied this object into a child process. The child can't use the copy."""
        register(self)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.sa_engine.dialect.name

    def pool(self, *, read_only: bool) -> ConnectionPool[StoreConnection]:
        """Return the pool of connections for reading or for writing."""
        if self.is_forked_copy:
            raise _invalidated()
        return self.readers if read_only else self.writers

    def begin(self, read_only: bool, timeout: float) -> StoreConnection:
        """Take a connection from its pool within `timeout=` seconds, and begin a transaction."""
        # Do not call `self.pool()`, which would cost time in every unit.
        if self.is_forked_copy:
            raise _invalidated()
        pool = self.readers if read_only else self.writers
        while True:
            connection = pool.acquire(timeout)
            try:
                connection.begin()
            except BaseException as error:
                # An open connection keeps the content of a deleted file readable.
                if isinstance(error, (DatabaseBusyError, DatabaseMovedError)) and not connection.in_transaction:
                    pool.release(connection)
                    raise
                stale = connection.is_stale(error)
                pool.discard(connection)
                if not stale:
                    raise
            else:
                return connection
            # The server has probably ended the other idle connections too. Only BEGIN was sent, so another try can't
            # repeat a change.
            self.discard_free()

    def read_alone(self, statement: Statement[R], parameters: Parameters, timeout: float) -> list[R]:
        """Run a read-only statement in autocommit mode. If the connection was lost, run the statement a second time."""
        if self.is_forked_copy:
            raise _invalidated()
        pool, check = self.readers, self.identity_check
        again = True
        while True:
            connection = pool.acquire(timeout)
            try:
                if check is not None and check.monotonic() >= check.due:
                    check.after_begin()
                found = connection.read_alone(statement, parameters.copy())
            except BaseException as error:
                is_lost = isinstance(error, ConnectionLostError)
                if not (is_lost and again):
                    parameters.clear()  # a log record about a failed close would contain the values
                pool.discard(connection)
                if is_lost:
                    self.discard_free()
                    if again:
                        again = False
                        continue
                self.counters.faulted(error)
                raise
            self.counters.reads += 1
            pool.release(connection)
            return found

    def translate(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for an exception of the driver."""
        raise NotImplementedError  # Each engine overrides the method.

    def translated(self) -> AbstractContextManager[None]:
        """Raise homeagent's error instead of an exception of the driver."""
        return translated(self.driver_errors, self.translate)

    def _connection(self, *, read_only: bool) -> StoreConnection:
        """Open and prepare a connection for a pool. Record the connection for `require_reconnect()` and for a fork."""
        raw = self.connect()
        try:
            self.prepare_connection(raw, read_only=read_only)
            connection = self.connection_type(raw, self, read_only=read_only)
        except BaseException:
            raw.close()
            raise
        self._connections.add(connection)
        return connection

    def begin_of(self, connection: sqlalchemy.Connection, *, read_only: bool) -> Sequence[str]:
        """Return the SQL statements that begin a unit on the connection."""
        return self.begin_read if read_only else self.begin_write

    def require_reconnect(self) -> None:
        """Make every connection close at the end of its unit."""
        for connection in list(self._connections):
            connection.needs_reconnect = True

    def discard_free(self) -> None:
        """Close the connections that no unit uses."""
        self.writers.discard_free()
        self.readers.discard_free()

    def connect(self) -> sqlalchemy.Connection:
        """Return a new connection that belongs to no pool. The caller must close the connection."""
        raise NotImplementedError  # Each engine overrides the method.

    def open_read_connection(self) -> sqlalchemy.Connection:
        """Return a new read-only connection. All statements of the connection's transaction read one snapshot."""
        raise NotImplementedError  # Each engine overrides the method.

    @contextmanager
    def read_connection(self, timeout: float) -> Iterator[sqlalchemy.Connection]:
        """Yield a read-only connection (see `Database.read_connection`)."""
        if self.is_forked_copy:
            raise _invalidated()
        connection = self.read_connections.acquire(timeout)
        try:
            yield connection
        finally:
            self.read_connections.discard(connection)

    def prepare_connection(self, connection: sqlalchemy.Connection, *, read_only: bool) -> None:
        """Apply the settings that differ between reading and writing connections."""

    def close(self) -> None:
        """Close every connection. A second call of the method has no effect."""
        if self._closed:
            return
        self._closed = True
        if self.is_forked_copy:
            return
        self.writers.close()
        self.readers.close()
        self.read_connections.close()
        self.feed_connections.close()
        self.sa_engine.dispose()
        self.after_close()

    def after_close(self) -> None:
        """Release resources such as lock files. Call the method after the last connection was closed."""

    def fork_locks(self) -> Sequence[threading.RLock]:
        """Return the mutexes that a fork must acquire, in the right order."""
        # Take `feed_mutex` first. Otherwise a fork that waits for `feed_mutex` would block all units.
        pools = self.writers, self.readers
        return self.feed_mutex, *(pool.making for pool in pools), *(pool.mutex for pool in pools)

    def before_fork(self) -> None:
        """Close the connections that a forked child must not inherit."""

    def after_fork_in_child(self) -> None:
        """In a forked child, make the parent's connections unusable."""
        for connection in list(self._connections):
            connection.invalidate()


def _invalidated() -> DatabaseClosedError:
    """Return the error for a database that was opened before a fork."""
    return DatabaseClosedError("this database was opened before the process was forked: open it again in the child")
