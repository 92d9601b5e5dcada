"""A long-lived database connection. The connection runs precompiled statements, and can serve an ORM session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy import Connection

from homeagent.engine.driver_errors import commit_unknown, naming_statement, transaction_ended, translated
from homeagent.engine.instrumented_cursor import InstrumentedCursor, has_listeners
from homeagent.engine.statements import Compiled, Parameters, Row, Statement, no_statement
from homeagent.errors import ConnectionLostError, DatabaseClosedError, HomeAgentError, ReadOnlyError, UnitStateError
from homeagent.frame_locals import clear_locals
from homeagent.models.types import UNREADABLE

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.engine import RootTransaction
    from sqlalchemy.pool import PoolProxiedConnection

    from homeagent.engine.engine import Engine

R = TypeVar("R")


class UnitConnection(Connection):
    """SQLAlchemy's view of a `StoreConnection` for one transaction. The view does not work after the transaction."""

    def __init__(self, connection: Connection) -> None:
        # Share the driver's connection and the event listeners.
        vars(self).update(vars(connection))
        self._lent = connection
        self._can_commit = False

    def commit_unit(self, root: RootTransaction) -> None:
        """Commit the transaction of the unit."""
        self._can_commit = True
        try:
            root.commit()
        finally:
            self._can_commit = False

    def end(self) -> None:
        """Make every further statement raise UnitStateError."""
        self._dbapi_connection = self._transaction = self._nested_transaction = None

    def close(self) -> None:
        """Close the driver's connection too, unless the transaction has ended."""
        is_attached = self._dbapi_connection is not None
        super().close()
        if is_attached:
            self._lent.close()

    def _commit_impl(self) -> None:
        if not self._can_commit:
            raise UnitStateError("a unit of work commits its transaction itself: remove the call of commit()")
        super()._commit_impl()

    def _revalidate_connection(self) -> PoolProxiedConnection:
        # SQLAlchemy calls this method for a connection without a driver's connection.
        raise UnitStateError("the unit of work of this connection was rolled back or has ended: open another unit")


class StoreConnection:
    """A long-lived connection outside SQLAlchemy's pool. Only one unit of work at a time can use the connection."""

    def __init__(self, connection: Connection, engine: Engine, *, read_only: bool) -> None:
        self._connection = connection
        self.dialect: Dialect = connection.dialect
        self._engine = engine
        self._begin = "; ".join(engine.begin_of(connection, read_only=read_only))
        self.read_only: bool = read_only
        self._compile_key = (self.dialect.name, read_only)
        self._driver_errors = engine.driver_errors
        self._identity_check = engine.identity_check
        self.needs_reconnect: bool = False
        """True if the connection must be replaced after a system failure. The engine sets this attribute."""
        raw: Any = connection.connection.driver_connection
        self._raw = raw
        self._cursor: Any = self._open_cursor(raw)
        if has_listeners(connection):
            self._cursor = InstrumentedCursor(connection, self._cursor, self._driver_errors, self._translate)
        self._execute: Callable[..., Any] = self._cursor.execute
        self.changes: Callable[[], int] = partial(getattr, self._cursor, "rowcount")
        """Returns the number of rows that the last statement changed."""
        self._root: RootTransaction | None = None
        self._view: UnitConnection | None = None
        self.memory: dict[str, Any] = {}
        """Cache of values that do not change while the connection is open."""

    @staticmethod
    def _open_cursor(raw: Any) -> Any:
        return raw.cursor()

    def _translate(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for an exception of the driver. On PostgreSQL, also record a lost connection."""
        return self._engine.translate(error)

    @property
    def driver_connection(self) -> Any:
        """The driver's connection object."""
        return self._raw

    def begin(self) -> None:
        """Begin a transaction. On SQLite, a read-only unit takes a snapshot. A write unit takes SQLite's write lock."""
        failure: BaseException
        try:
            self._execute(self._begin)
        except self._driver_errors as error:
            failure = self._translate(error)
        else:
            check = self._identity_check
            if check is not None and check.monotonic() >= check.due:
                try:
                    check.after_begin()
                except HomeAgentError:
                    self.rollback()
                    raise
            return
        raise failure

    def check_file(self) -> None:
        """If the file was moved or replaced, raise DatabaseMovedError. Check the file at most once every 10 ms."""
        check = self._identity_check
        if check is not None and check.monotonic() >= check.due:
            check.after_begin()

    def commit(self) -> None:
        """Commit the transaction. If a failed COMMIT can still take effect, raise CommitUnknownError."""
        if self._identity_check is not None and not self.read_only:
            self._identity_check.before_commit()
        self.require_transaction()
        failure: BaseException
        try:
            if self._root is not None and self._view is not None:
                self._view.commit_unit(self._root)
                self.end_orm()
            else:
                self._execute("COMMIT")
        except self._driver_errors as error:
            failure = self._commit_failure(error)
        except ConnectionLostError as error:
            failure = error  # a listener of SQLAlchemy has already translated the driver's exception
        else:
            return
        if isinstance(failure, ConnectionLostError) and not self.read_only:
            failure = commit_unknown()
        raise failure

    def _commit_failure(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for a failed COMMIT. On SQLite, the method can return a CommitUnknownError."""
        return self._refused(error, "COMMIT")

    def rollback(self) -> None:
        """Roll back the transaction. In a forked child, or without a transaction, do nothing."""
        if isinstance(self._raw, _ClosedAfterFork):
            return  # the transaction belongs to the parent process
        self._execute = self._cursor.execute
        if self._root is not None:
            root, self._root = self._root, None
            # After a failed flush, SQLAlchemy has already rolled back the root transaction.
            if root.connection.get_transaction() is root:
                root.rollback()
        self.end_orm()
        if self.in_transaction:
            self.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """True if the driver's connection is inside a transaction."""
        try:
            return bool(self._raw.in_transaction)
        except self._driver_errors:  # another thread runs a statement on the connection
            return not self.is_lost

    def require_transaction(self) -> None:
        """Raise UnitStateError if the transaction has ended, for example by SQL such as COMMIT. Then also refuse later
        statements, which the database would commit immediately.
        """
        if not (self.in_transaction or isinstance(self._raw, _ClosedAfterFork)):
            self._execute = refuse_statement
            raise transaction_ended()

    @property
    def is_lost(self) -> bool:
        """True if the connection has ended, for example by Ctrl-C, or if the application has closed it."""
        return self._connection.invalidated or self._connection.closed

    def close_interrupted(self) -> None:
        """On PostgreSQL, close the connection if an exception has interrupted a statement, which still runs."""

    def is_stale(self, failure: BaseException) -> bool:
        """Return whether BEGIN failed because the server ended the idle connection. On SQLite, return False."""
        return False

    def orm_connection(self) -> Connection:
        """Return SQLAlchemy's connection for an ORM session in the open transaction."""
        self.require_transaction()
        if self._root is None:
            self.end_orm()
            self._view = UnitConnection(self._connection)
            self._root = self._view.begin()
        return self._root.connection

    def end_orm(self) -> None:
        """Forget the ORM session's transaction, and detach the connection that the application can have kept."""
        if self._view is not None:
            self._view.end()
        self._root = self._view = None

    @property
    def has_orm_transaction(self) -> bool:
        """True if the root transaction of SQLAlchemy's connection is active."""
        return self._root is not None and self._root.is_active

    def release_orm(self, *, keep: bool) -> None:
        """Undo the driver's `confine()`, end the open savepoints, and call `end_orm()`. With `keep=True`, keep the
        changes in the savepoints.
        """
        try:
            if not self.in_transaction:
                self.rollback()
            while self._view is not None and (nested := self._view.get_nested_transaction()) is not None:
                (nested.commit if keep else nested.rollback)()
        finally:
            if not self._connection.closed:
                self._raw.confine(None)
            self.end_orm()

    def rollback_to_savepoint(self, name: str) -> None:
        """Roll back the changes after a savepoint, and release the savepoint."""
        self.execute(f"ROLLBACK TO SAVEPOINT {name}")
        self.execute(f"RELEASE SAVEPOINT {name}")

    def execute(self, sql: str) -> Any:
        """Run SQL text, such as a pragma, and return the driver's cursor."""
        failure: BaseException
        try:
            return self._execute(sql)
        except self._driver_errors as error:
            failure = self._refused(error, sql)
        raise failure

    def _refused(self, error: BaseException, sql: str) -> HomeAgentError:
        """Return homeagent's error for a failed statement. Add the SQL text to a plain DatabaseError."""
        return naming_statement(self._translate(error), sql)

    def rows(self, statement: Statement[R], parameters: Parameters) -> list[R]:
        """Run a statement, and return its rows. After an error, clear the parameters, which a traceback could show."""
        stored: Sequence[Row] = ()
        failure: HomeAgentError
        try:
            compiled = statement._cache.get(self._compile_key) or statement.compiled(
                self.dialect, read_only=self.read_only
            )
            if compiled.writes and self.read_only and not compiled.is_text:
                raise _read_only()
            cursor = self._execute(compiled.sql, compiled.bind(parameters))
            # Do not use fetchone: an unread row keeps SQLite's locks and snapshot. With RETURNING, SQLite counts the
            # changed rows after the last fetch.
            if compiled.columns:
                stored = cursor.fetchall()
            elif compiled.is_text:
                stored = self._rows_of_text(cursor)
                self.require_transaction()
        except HomeAgentError as error:
            failure = error
        except AttributeError:
            given: object = statement
            if isinstance(given, Statement):
                raise
            failure = no_statement(given)
        except self._driver_errors as error:
            failure = self._unread_rows(error, compiled, parameters) or self._refused(error, compiled.sql)
        else:
            try:
                return compiled.load(stored) if stored else []
            except UNREADABLE:
                failure = compiled.unreadable(stored, parameters)
        stored = ()
        parameters.clear()
        clear_locals(failure)
        raise failure

    read_alone = rows
    """Run one statement outside a unit. The statement must only read."""

    def _rows_of_text(self, cursor: Any) -> Sequence[Row]:
        """Return the rows of a statement from SQLAlchemy's text(). Without a result, return no rows."""
        rows: Sequence[Row] = cursor.fetchall()
        return rows

    def look_for_commits(self) -> bool:
        """Return True if another connection may have committed since the last call."""
        return True

    def _unread_rows(
        self, error: BaseException, compiled: Compiled[Any], parameters: Parameters
    ) -> HomeAgentError | None:
        """Return the error for a value that can't be decoded, or None. The error names the row."""
        return None

    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Run a statement for each set of parameters. Return the total number of changed rows."""
        if self.read_only:
            raise _read_only()
        compiled = statement.compiled(self.dialect)
        with self._naming(compiled.sql):
            self._cursor.executemany(compiled.sql, map(compiled.bind, parameters))
        return int(self._cursor.rowcount)

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows by the driver's fastest method, without converting the values."""
        if self.read_only:
            raise _read_only()
        quote = self.dialect.identifier_preparer.quote
        into = f"{quote(table)} ({', '.join(map(quote, columns))})"
        with self._naming(f"INSERT INTO {into}"):
            self._insert(into, len(columns), rows)

    def _naming(self, sql: str) -> AbstractContextManager[None]:
        """Return a context manager that translates the driver's exceptions by `_refused()`."""
        return translated(self._driver_errors, partial(self._refused, sql=sql))

    def _insert(self, into: str, width: int, rows: Iterable[Row]) -> None:
        """Insert rows. A text such as "devices (id, role)" names the table and columns."""
        places = ", ".join("?" * width)
        self._cursor.executemany(f"INSERT INTO {into} VALUES ({places})", rows)  # noqa: S608  names from the models

    def invalidate(self) -> None:
        """In a forked child, make every further statement raise `DatabaseClosedError`."""
        if self._connection.closed:
            return  # The connection was closed before the fork.
        # Do not close the connection. SQLite would delete the WAL of the parent process.
        gone: Any = _ClosedAfterFork()
        _keep_forever(self._raw)
        self._identity_check = None
        self._raw, self._cursor, self._execute = gone, gone, gone
        fairy: Any = self._connection.connection  # an ORM session uses SQLAlchemy's connection
        fairy.dbapi_connection = gone

    def close(self) -> None:
        """Close the connection. The database rolls back a transaction that is still open."""
        if self.is_lost and not self._connection.closed:
            self._connection.invalidate()  # otherwise SQLAlchemy would try to roll back, and would log an error
        self._connection.close()


class _ClosedAfterFork:
    """A stand-in for a connection or cursor in a forked child. Each call of the object raises DatabaseClosedError."""

    in_transaction = False
    closed = False

    def __call__(self, *arguments: object, **named: object) -> Any:
        raise DatabaseClosedError(
            "this unit of work was begun before the process was forked: open the database again in the child"
        )

    def __getattr__(self, name: str) -> Any:
        return self


_kept: list[object] = []


def _keep_forever(connection: object) -> None:
    """Keep an object in memory, even while the interpreter shuts down."""
    _kept.append(connection)
    try:
        import ctypes
    except ImportError:
        return  # without ctypes, the interpreter deletes the object at shutdown
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def refuse_statement(*_statement: object) -> NoReturn:
    """Raise UnitStateError. After the end of a transaction, this function replaces the cursor's method `execute()`."""
    raise transaction_ended()


def _read_only() -> ReadOnlyError:
    """Return the error for a write in a read-only unit. The caller must raise the error."""
    return ReadOnlyError("this unit of work can only read: open it without read_only=True to write")
