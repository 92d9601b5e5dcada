"""The engine as the floors above see it: lanes of links to write and to read on, and SQLAlchemy's engine behind."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from homeagent.engine.connection import StoreConnection
from homeagent.engine.counters import Counters
from homeagent.engine.fork import register
from homeagent.engine.pool import ConnectionPool
from homeagent.errors import ConnectionLostError, DatabaseBusyError, DatabaseClosedError, DatabaseMovedError

if TYPE_CHECKING:
    import sqlalchemy

    from homeagent.engine.driver_errors import Translate
    from homeagent.engine.files.file_identity import FileIdentityCheck
    from homeagent.engine.statements import Compiled, Parameters, Statement

__all__ = ["Engine", "open_engines"]


READ_CONNECTIONS = 2
"""How many connections a host may read on at once, past the stores."""


class Engine(ABC):
    """One open database: who may write next, who may read, and how a driver's fault is told.

    Args:
        sa_engine: SQLAlchemy's engine; the links are connections of it that are kept.
        driver_errors: the root of the driver's exceptions.
        translate: from one of these to one of ours.
        writers: how many units may write at once.
        readers: how many units may read at once.
        begin_write, begin_read: the SQL that begins a unit.
        watch: tells whether the database's file is still the one that was opened; None for a server.

    Attributes:
        counters: what was done so far.
    """

    write_connection_type: type[StoreConnection] = StoreConnection
    read_connection_type: type[StoreConnection] = StoreConnection
    shares_commits = False
    """Whether units that wait for one another are worth a common commit."""

    def __init__(
        self,
        sa_engine: sqlalchemy.Engine,
        *,
        driver_errors: tuple[type[BaseException], ...],
        translate: Translate,
        writers: int,
        readers: int,
        begin_write: Sequence[str],
        begin_read: Sequence[str],
        watch: FileIdentityCheck | None = None,
    ) -> None:
        self.sa_engine = sa_engine
        self.driver_errors = driver_errors
        self.translate = translate
        self._identity_check = watch
        self._connections: weakref.WeakSet[StoreConnection] = weakref.WeakSet()
        self._begin = {False: tuple(begin_write), True: tuple(begin_read)}
        self._compiled: dict[bool, dict[Statement[Any], Compiled[Any]]] = {False: {}, True: {}}
        self.counters = Counters()
        waited = self.counters.waited
        self.writers: ConnectionPool[StoreConnection] = ConnectionPool(
            writers, lambda: self._connection(read_only=False), name="write lane", waited=waited
        )
        self.readers: ConnectionPool[StoreConnection] = ConnectionPool(
            readers, lambda: self._connection(read_only=True), name="set of read lanes", waited=waited
        )
        self.read_connections: ConnectionPool[sqlalchemy.Connection] = ConnectionPool(
            READ_CONNECTIONS, self.open_read_connection, name="set of read connections"
        )
        self._closed = False
        self.is_forked_copy = False
        """Whether this is a forked child's copy."""
        _engines.add(self)
        register(self)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.sa_engine.dialect.name

    def pool(self, *, read_only: bool) -> ConnectionPool[StoreConnection]:
        """Return the lanes that a unit takes its link from."""
        if self.is_forked_copy:
            raise _invalidated()
        return self.readers if read_only else self.writers

    def begin(self, *, read_only: bool, timeout: float) -> StoreConnection:
        """Return a link that nobody else uses, with its transaction begun.

        A connection that its server gave up while it was idle is put away with all the other idle ones, and a fresh
        one is taken: nothing was sent over it but BEGIN.

        Args:
            read_only: which kind of unit it is for.
            timeout: how long to wait for a lane, in seconds.

        Raises:
            DatabaseBusyError: no lane was given up in time, or the database was busy.
            DatabaseClosedError: the database was closed, or opened before a fork.
            ConnectionLostError: no server lets a fresh connection in.
        """
        # As `lanes` does: a call less in every unit.
        if self.is_forked_copy:
            raise _invalidated()
        pool = self.readers if read_only else self.writers
        while True:
            connection = pool.acquire(timeout)
            try:
                connection.begin()
            except BaseException as error:
                # A file that lost its name lives on as long as a connection is open: it may be put back.
                if isinstance(error, (DatabaseBusyError, DatabaseMovedError)) and not connection.in_transaction:
                    pool.release(connection)
                    raise
                stale = connection.is_stale(error)
                pool.discard(connection)
                if not stale:
                    raise
            else:
                return connection
            # Each turn takes a connection away, and the first fresh one ends it.
            self.discard_free()

    def read_alone(
        self, act: Literal["one", "all"], statement: Statement[Any], parameters: Parameters, timeout: float
    ) -> Any:
        """Run one statement that reads, in autocommit mode; once more if its connection was lost.

        Args:
            act: which method of `StoreConnection` runs the statement.
            statement: a statement that reads.
            parameters: its parameters, by name.
            timeout: how long to wait for a connection, in seconds.

        Raises:
            DatabaseBusyError: no connection was free in time.
            DatabaseClosedError: the database was closed, or opened before a fork.
            ConnectionLostError: no server lets a fresh connection in.
        """
        if self.is_forked_copy:
            raise _invalidated()
        pool = self.readers
        again = True
        while True:
            connection = pool.acquire(timeout)
            try:
                found = connection.read_alone(act, statement, parameters)
            except ConnectionLostError:
                pool.discard(connection)
                self.discard_free()
                if not again:
                    raise
                again = False
            except BaseException as error:
                pool.discard(connection)
                self.counters.faulted(error)
                raise
            else:
                self.counters.reads += 1
                pool.release(connection)
                return found

    @property
    def contention(self) -> int:
        """How often a unit that writes had to wait so far, for another one of this process or for another process."""
        return self.writers.waits

    @abstractmethod
    def empty_log(self, timeout: float, *, truncate: bool = False) -> bool:
        """Move what a log holds into the database, where that is a file, in a turn of its own.

        Args:
            timeout: how long to wait for that, in seconds.
            truncate: whether to wait for readers too, and to give the log's room back.

        Returns:
            False where it was not truncated, since somebody needed it for as long.
        """

    def _connection(self, *, read_only: bool) -> StoreConnection:
        raw = self.connect()
        try:
            self.prepare_connection(raw, read_only=read_only)
            make = self.read_connection_type if read_only else self.write_connection_type
            connection = make(
                raw,
                begin=self.begin_of(raw, read_only=read_only),
                read_only=read_only,
                compiled=self._compiled[read_only],
                driver_errors=self.driver_errors,
                translate=self.translate,
                watch=self._identity_check,
            )
        except BaseException:
            raw.close()
            raise
        self._connections.add(connection)
        return connection

    def begin_of(self, connection: sqlalchemy.Connection, *, read_only: bool) -> Sequence[str]:
        """Return the SQL that begins a unit on this connection."""
        return self._begin[read_only]

    def require_reconnect(self) -> None:
        """Have every connection closed when the unit on it ends, and not used for another one."""
        for connection in list(self._connections):
            connection.needs_reconnect = True

    def discard_free(self) -> None:
        """Close the connections that no unit uses; the next ones are opened anew."""
        self.writers.discard_free()
        self.readers.discard_free()

    @abstractmethod
    def connect(self) -> sqlalchemy.Connection:
        """Return a connection of SQLAlchemy's engine, outside of the lanes."""

    @abstractmethod
    def open_read_connection(self) -> sqlalchemy.Connection:
        """Return a connection of its own that can't write, in a transaction that has one snapshot."""

    @contextmanager
    def read_connection(self, timeout: float) -> Iterator[sqlalchemy.Connection]:
        """Lend a connection that can't write, see `Database.read_connection`."""
        if self.is_forked_copy:
            raise _invalidated()
        connection = self.read_connections.acquire(timeout)
        try:
            yield connection
        finally:
            self.read_connections.discard(connection)

    @abstractmethod
    def prepare_connection(self, connection: sqlalchemy.Connection, *, read_only: bool) -> None:
        """Set what a link of this kind needs beyond what every connection has."""

    def close(self) -> None:
        """Close every connection; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        _engines.discard(self)
        if self.is_forked_copy:
            return
        self.writers.close()
        self.readers.close()
        self.read_connections.close()
        self.sa_engine.dispose()
        self.after_close()

    @abstractmethod
    def after_close(self) -> None:
        """Do what must wait until the last connection is closed."""

    @abstractmethod
    def before_fork(self) -> None:
        """Close what a forked child must not inherit."""

    def after_fork_in_child(self) -> None:
        """Make the connections unusable: in this forked child they are copies, and belong to the parent."""
        for connection in list(self._connections):
            connection.invalidate()


def _invalidated() -> DatabaseClosedError:
    return DatabaseClosedError("this database was opened before the process was forked: open it again in the child")


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def open_engines() -> list[Engine]:
    """Return the engines that this process has open."""
    return list(_engines)
