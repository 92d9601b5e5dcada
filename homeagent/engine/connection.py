"""A link: one pinned connection that runs compiled statements, and lends itself to an ORM session on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from homeagent.engine.driver_errors import commit_unknown, naming_statement
from homeagent.engine.instrumented_cursor import InstrumentedCursor, has_listeners
from homeagent.engine.statements import Compiled, Parameters, Row, Statement
from homeagent.errors import ConnectionLostError, DatabaseClosedError, HomeAgentError, ReadOnlyError
from homeagent.models.types import UNREADABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.engine import RootTransaction

    from homeagent.engine.driver_errors import Translate
    from homeagent.engine.files.file_identity import FileIdentityCheck

__all__ = ["StoreConnection"]

R = TypeVar("R")


class StoreConnection:
    """A connection kept out of SQLAlchemy's pool, on which one unit of work runs at a time.

    Args:
        connection: SQLAlchemy's, which the ORM session binds to.
        begin: the SQL that begins a transaction, one statement after the other.
        read_only: whether units on it can only read.
        compiled: the statements compiled so far, shared by the links of one kind.
        driver_errors: what the driver raises.
        translate: from one of these to one of ours.
        watch: tells whether the database's file is still the one that was opened; None for a server.
    """

    __slots__ = (
        "__weakref__",
        "_begin",
        "_compiled",
        "_connection",
        "_cursor",
        "_dialect",
        "_driver_errors",
        "_execute",
        "_identity_check",
        "_raw",
        "_root",
        "_translate",
        "memory",
        "needs_reconnect",
        "read_only",
    )

    def __init__(
        self,
        connection: Connection,
        *,
        begin: Sequence[str],
        read_only: bool,
        compiled: dict[Statement[Any], Compiled[Any]],
        driver_errors: tuple[type[BaseException], ...],
        translate: Translate,
        watch: FileIdentityCheck | None = None,
    ) -> None:
        self._connection = connection
        self._dialect: Dialect = connection.dialect
        self._begin = tuple(begin)
        self.read_only = read_only
        self._compiled = compiled
        self._driver_errors = driver_errors
        self._translate = translate
        self._identity_check = watch
        self.needs_reconnect = False
        """Whether it met, or may have met, a failure of the system: a new connection begins without its remains."""
        raw: Any = connection.connection.driver_connection
        self._raw = raw
        self._cursor: Any = self._open_cursor(raw)
        if has_listeners(connection):
            self._cursor = InstrumentedCursor(
                connection, self._cursor, driver_errors=driver_errors, translate=translate
            )
        self._execute: Callable[..., Any] = self._cursor.execute
        self._root: RootTransaction | None = None
        self.memory: dict[str, Any] = {}
        """What was read over this connection and stays true for as long as it is open."""

    @staticmethod
    def _open_cursor(raw: Any) -> Any:
        return raw.cursor()

    @property
    def driver_connection(self) -> Any:
        """The driver's own connection."""
        return self._raw

    # Transactions

    def begin(self) -> None:
        """Begin a transaction: the write lock is taken, or the snapshot is."""
        fault: BaseException
        try:
            for statement in self._begin:
                self._execute(statement)
        except self._driver_errors as error:
            fault = self._translate(error)
        else:
            watch = self._identity_check
            if watch is not None and watch.monotonic() >= watch.due:
                self._look_after_begin(watch)
            return
        raise fault

    def check_file(self) -> None:
        """Check that the database's file is still the file that was opened, if the last check is too old.

        Raises:
            DatabaseMovedError: it was moved or replaced.
        """
        watch = self._identity_check
        if watch is not None and watch.monotonic() >= watch.due:
            watch.after_begin()

    def _look_after_begin(self, watch: FileIdentityCheck) -> None:
        try:
            watch.after_begin()
        except HomeAgentError:
            self.rollback()
            raise

    def commit(self) -> None:
        """Commit; when this returns, what the unit wrote is as durable as the engine was asked to make it.

        Raises:
            DatabaseMovedError: the file is no longer the one that was opened. Nothing was committed.
            CommitUnknownError: the connection was lost before the answer came, or a failed commit may still reappear.
        """
        if self._identity_check is not None and not self.read_only:
            self._identity_check.before_commit()
        fault: BaseException
        try:
            if self._root is not None:
                self._root.commit()
                self._root = None
            else:
                self._send_commit()
        except self._driver_errors as error:
            fault = self._refused(error, "COMMIT")
        except ConnectionLostError as error:
            # SQLAlchemy's connection has translated it.
            fault = error
        else:
            return
        if isinstance(fault, ConnectionLostError) and not self.read_only:
            fault = commit_unknown()
        raise fault

    def _send_commit(self) -> None:
        self._execute("COMMIT")

    def rollback(self) -> None:
        """Undo everything since `begin`. Nothing to undo is fine: the engine may have done it by itself."""
        if isinstance(self._raw, _Gone):
            return  # there is nothing of this process's to undo
        if self._root is not None:
            root, self._root = self._root, None
            # A flush that failed has rolled it back already; a COMMIT that failed leaves it on the connection.
            if self._connection.get_transaction() is root:
                root.rollback()
        if self.in_transaction:
            self.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether the driver's connection is inside a transaction."""
        return bool(self._raw.in_transaction)

    @property
    def is_lost(self) -> bool:
        """Whether the driver knows that the connection is gone: never so for a file."""
        return False

    def is_stale(self, fault: BaseException) -> bool:
        """Tell whether a BEGIN failed with this only because the link had been idle for long: never so for a file."""
        return False

    def orm_connection(self) -> Connection:
        """Return SQLAlchemy's connection, told that the transaction of this link has begun."""
        if self._root is None:
            self._root = self._connection.begin()
        return self._connection

    def savepoint(self, name: str) -> None:
        """Set a savepoint."""
        self.execute(f"SAVEPOINT {name}")

    def release_savepoint(self, name: str) -> None:
        """Forget a savepoint and keep what was done since."""
        self.execute(f"RELEASE SAVEPOINT {name}")

    def rollback_to_savepoint(self, name: str) -> None:
        """Undo what was done since a savepoint, and forget it."""
        self.execute(f"ROLLBACK TO SAVEPOINT {name}")
        self.execute(f"RELEASE SAVEPOINT {name}")

    # Statements

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """Run SQL that is no store's statement, such as a pragma, and return the driver's cursor."""
        fault: BaseException
        try:
            return self._execute(sql, parameters) if parameters else self._execute(sql)
        except self._driver_errors as error:
            fault = self._refused(error, sql)
        raise fault

    def _refused(self, error: BaseException, sql: str) -> HomeAgentError:
        """Return homeagent's error for an exception of the driver, and name the statement if the engine refused it."""
        return naming_statement(self._translate(error), sql)

    def _compile(self, statement: Statement[R]) -> Compiled[R]:
        compiled = statement.compiled(self._dialect, read_only=self.read_only)
        self._compiled[statement] = compiled
        return compiled

    def one(self, statement: Statement[R], parameters: Parameters) -> R | None:
        """Return what the first row stands for, or None where there is none."""
        compiled = self._compiled.get(statement) or self._compile(statement)
        if compiled.writes and self.read_only:
            raise _read_only()
        fault: BaseException
        try:
            # fetchall and not fetchone: a statement with a row left keeps its locks and its snapshot.
            rows = self._execute(compiled.sql, compiled.bind(parameters)).fetchall()
        except self._driver_errors as error:
            fault = self._unread_rows(error, compiled, parameters) or self._refused(error, compiled.sql)
        else:
            try:
                return compiled.load(rows)[0] if rows else None
            except UNREADABLE:
                fault = compiled.unreadable(rows, parameters)
        raise fault

    def all(self, statement: Statement[R], parameters: Parameters) -> list[R]:
        """Return what the rows stand for, in their order."""
        compiled = self._compiled.get(statement) or self._compile(statement)
        if compiled.writes and self.read_only:
            raise _read_only()
        fault: BaseException
        try:
            rows = self._execute(compiled.sql, compiled.bind(parameters)).fetchall()
        except self._driver_errors as error:
            fault = self._unread_rows(error, compiled, parameters) or self._refused(error, compiled.sql)
        else:
            try:
                return compiled.load(rows)
            except UNREADABLE:
                fault = compiled.unreadable(rows, parameters)
        raise fault

    def read_alone(self, act: Literal["one", "all"], statement: Statement[Any], parameters: Parameters) -> Any:
        """Run one statement that reads, outside of a unit: `act` says which method of this class runs it."""
        self.check_file()
        return getattr(self, act)(statement, parameters)

    def _unread_rows(
        self, error: BaseException, compiled: Compiled[Any], parameters: Parameters
    ) -> HomeAgentError | None:
        """Return the error that names the row that the driver can't decode; None if the driver met another error."""
        return None

    def write(self, statement: Statement[Any], parameters: Parameters) -> int:
        """Run a statement that changes rows, and return how many."""
        if self.read_only:
            raise _read_only()
        compiled = self._compiled.get(statement) or self._compile(statement)
        fault: BaseException
        try:
            return int(self._execute(compiled.sql, compiled.bind(parameters)).rowcount)
        except self._driver_errors as error:
            fault = self._refused(error, compiled.sql)
        raise fault

    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Run a statement once for each set of parameters, and return how many rows changed in all."""
        if self.read_only:
            raise _read_only()
        compiled = self._compiled.get(statement) or self._compile(statement)
        fault: BaseException
        try:
            self._cursor.executemany(compiled.sql, map(compiled.bind, parameters))
            return int(self._cursor.rowcount)
        except self._driver_errors as error:
            fault = self._refused(error, compiled.sql)
        raise fault

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows of values as they are stored, by the fastest way that the driver has.

        Args:
            table: the table's name.
            columns: the names of its columns, in the order of the values.
            rows: one sequence of values for each row.
        """
        if self.read_only:
            raise _read_only()
        quote = self._dialect.identifier_preparer.quote
        into = f"{quote(table)} ({', '.join(map(quote, columns))})"
        fault: BaseException
        try:
            self._insert(into, len(columns), rows)
        except self._driver_errors as error:
            fault = self._refused(error, f"INSERT INTO {into}")
        else:
            return
        raise fault

    def _insert(self, into: str, width: int, rows: Iterable[Row]) -> None:
        """Insert rows into what is given as `table (columns)`, quoted."""
        places = ", ".join("?" * width)
        self._cursor.executemany(f"INSERT INTO {into} VALUES ({places})", rows)  # noqa: S608  names of ours

    def invalidate(self) -> None:
        """Have everything that is done on it refused, a unit in the middle of which the process was forked included.

        The connection is never closed: SQLite would look for the parent's log by its name, and delete it.
        """
        if self._connection.closed:
            return  # before the fork, and only what remembers its last error holds it
        gone: Any = _Gone()
        _leak(self._raw)
        self._identity_check = None
        self._raw, self._cursor, self._execute = gone, gone, gone
        # For an ORM session, which works on SQLAlchemy's connection.
        fairy: Any = self._connection.connection
        fairy.dbapi_connection = gone

    def close(self) -> None:
        """Close the connection. Whatever it was in the middle of is rolled back by the engine."""
        if self.is_lost:
            # SQLAlchemy would try to roll back on it, and log that it can't.
            self._connection.invalidate()
        self._connection.close()


class _Gone:
    """What a forked child has in the place of its parent's connection."""

    in_transaction = False
    closed = False

    def __call__(self, *arguments: object, **named: object) -> Any:
        raise DatabaseClosedError(
            "this unit of work was begun before the process was forked, and is the parent's: open the database again"
        )

    def __getattr__(self, name: str) -> Any:
        return self


_kept: list[Any] = []


def _leak(connection: object) -> None:
    """Keep an object from being freed as long as the process lives, at its very end too."""
    _kept.append(connection)
    try:
        import ctypes
    except ImportError:
        return  # some builds have none: then it is freed in the interpreter's last moments
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _read_only() -> ReadOnlyError:
    return ReadOnlyError("this unit of work can only read: open it without read_only=True to write")
