"""apsw as a DB-API module (PEP 249), and a SQLAlchemy dialect for apsw. Unlike the interpreter's sqlite3, the module
sends no BEGIN itself. An SQL text can contain several statements. Undecodable text raises UnicodeDecodeError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import apsw
from apsw import Connection as _Connection
from apsw import Cursor as _Cursor
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.pool import SingletonThreadPool

from homeagent.engine.driver_errors import commit_unknown, transaction_ended
from homeagent.errors import HomeAgentError

DRIVER_NAME = "sqlite+homeagent"

APSW_VERSION = apsw.apsw_version()
SQLITE_VERSION = apsw.sqlite_lib_version()

# https://peps.python.org/pep-0249/#globals
apilevel = "2.0"
threadsafety = 3
paramstyle = "qmark"
sqlite_version_info: tuple[int, ...] = tuple(map(int, SQLITE_VERSION.split(".")))
Binary = bytes
Error = apsw.Error
"""apsw has subclasses for SQLite's result codes, not DB-API's subclasses (see `_SQLALCHEMY_ERRORS`)."""

DRIVER_ERRORS = (apsw.Error, OverflowError, UnicodeError)
"""Exceptions that a statement can raise. OverflowError: integers over 64 bits. UnicodeError: undecodable text."""

_NOT_IN_WAL = (apsw.SQLITE_FULL, apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_CONSTRAINT_COMMITHOOK)
"""Result codes of a failed COMMIT that is not completely in the WAL."""

Description = tuple[tuple[str, None, None, None, None, None, None], ...]


def _note_description(cursor: Any, sql: str, bindings: object) -> bool:
    """Keep a statement's column names. apsw drops the names after the last row."""
    cursor.description = tuple((name, None, None, None, None, None, None) for name, _ in cursor.get_description())
    cursor.is_write = not cursor.is_readonly
    cursor.changes_before = cursor.connection.total_changes()
    return True


class StatementCursor(_Cursor):
    """A cursor for a store's statements, without the names of the columns."""

    _changed: int | None = None

    def executemany(self, statements: str, sequenceofbindings: Iterable[Any], **options: Any) -> _Cursor:
        """Run a statement once for each set of bindings."""
        # Do not use `total_changes()`, which also counts the changes of triggers. With a wrong count, the ORM raises
        # StaleDataError.
        changed = 0
        for bindings in sequenceofbindings:
            self.execute(statements, bindings).fetchall()  # SQLite counts the changed rows only after the last row
            changed += self.connection.changes()
        self._changed = changed
        return self

    @property
    def rowcount(self) -> int:
        """Number of changed rows; undefined after a statement that only reads."""
        if self._changed is None:
            return self.connection.changes()
        changed, self._changed = self._changed, None
        return changed


class Cursor(StatementCursor):
    """DB-API cursor for SQLAlchemy. A store's statements use the faster `StatementCursor`."""

    arraysize = 1
    description: Description | None = None  # type: ignore[assignment]  # apsw raises an error after the last row
    is_write = False
    changes_before = 0

    def __init__(self, connection: _Connection) -> None:
        super().__init__(connection)
        self.exec_trace: Any = _note_description

    def execute(self, statements: str, bindings: Any = None, **options: Any) -> Cursor:
        """Run a statement."""
        self.description = self._changed = None
        super().execute(statements, bindings, **options)
        self.description = self.description or None
        return self

    @property
    def rowcount(self) -> int:
        """Number of changed rows; -1 after a statement that only reads."""
        if self._changed is not None:
            return self._changed
        if not self.is_write:
            return -1
        # A statement that changes the schema does not reset `changes()`.
        return self.connection.changes() if self.connection.total_changes() != self.changes_before else 0

    @property
    def lastrowid(self) -> int:
        """The row id of the last inserted row."""
        return self.connection.last_insert_rowid()

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return at most the given number of rows. Without a number, return at most `arraysize` rows."""
        return list(islice(iter(self.fetchone, None), self.arraysize if size is None else size))


class Connection(_Connection):
    """DB-API connection. Outside a transaction each statement is committed at once."""

    autocommit = False
    closing: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)
    """Function that returns a context manager. The method `close()` runs in this context."""
    _savepoint: str | None = None

    def statement_cursor(self) -> StatementCursor:
        """Return a cursor for a store's statements."""
        # Do not call `StatementCursor()`. The method `close()` ends only the statements of cursors from `cursor()`.
        self.cursor_factory: Any = StatementCursor
        try:
            return self.cursor()  # type: ignore[return-value]  # created by `cursor_factory`
        finally:
            self.cursor_factory = Cursor

    def close(self, force: bool = True) -> None:
        """Close the connection, and end its unfinished statements. A second call of the method has no effect."""
        # With `force=False`, apsw does not close a connection with an unfinished statement.
        closing, self.closing = self.closing, nullcontext
        with closing():
            super().close(force)

    def require_transaction(self, *_statement: object) -> None:
        """Raise UnitStateError if SQLite has rolled back the whole transaction, for example on a full disk
        (https://sqlite.org/lang_transaction.html, section 3). After such a rollback, SQLite commits each further
        statement immediately.
        """
        if not self.in_transaction:
            raise transaction_ended()

    def commit(self) -> None:
        """Commit an open transaction."""
        if not self.in_transaction:
            return
        try:
            self.execute("COMMIT")
        except Exception as error:
            unknown = self.after_failed_commit(error)
            if unknown is None:
                raise
        else:
            return
        raise unknown

    def after_failed_commit(self, error: BaseException) -> HomeAgentError | None:
        """Overwrite a failed commit in the WAL. If the overwrite fails, return a CommitUnknownError."""
        # An open transaction has no commit in the WAL. After a failed write, the WAL contains only part of the
        # transaction.
        is_whole = not self.in_transaction and getattr(error, "extendedresult", 0) not in _NOT_IN_WAL
        if not is_whole or self._erase_failed_commit():
            return None
        return commit_unknown("the system failed to write the database's log in the middle of COMMIT")

    def _erase_failed_commit(self) -> bool:
        """Overwrite a failed commit in the WAL with an empty commit. Return True if the write succeeded. After a failed
        sync, a later connection could recover the failed commit. The empty commit replaces the first frame of the
        failed commit. So SQLite ignores the other frames, whose checksums no longer match. Do not sync the WAL, because
        the sync could fail again.
        """
        try:
            if self.pragma("query_only") or self.pragma("journal_mode") != "wal":
                return True
            synchronous, autocheckpoint = self.pragma("synchronous"), self.pragma("wal_autocheckpoint")
            try:
                # Switch off checkpoints. Without syncs, a power cut during a checkpoint can damage the database.
                self.execute("PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0")
                self.pragma("user_version", self.pragma("user_version"))
            finally:
                self.execute(f"PRAGMA synchronous={synchronous}; PRAGMA wal_autocheckpoint={autocheckpoint}")
        except apsw.Error:
            return False
        with suppress(apsw.Error):
            # After a checkpoint, the next commit writes a new header to the WAL. The function `find_lost_commits()`
            # ignores frames of an older header.
            self.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return True

    def rollback(self) -> None:
        """Roll back an open transaction. After `confine()`, roll back only to the savepoint."""
        if self.in_transaction:
            self.execute("ROLLBACK" if self._savepoint is None else f"ROLLBACK TO SAVEPOINT {self._savepoint}")

    def confine(self, savepoint: str | None) -> None:
        """Make `rollback()` return only to the given savepoint. A call with `savepoint=None` undoes an earlier call.
        While a savepoint is set, every COMMIT fails and becomes a ROLLBACK (https://sqlite.org/c3ref/commit_hook.html).
        """
        self._savepoint = savepoint
        self.set_commit_hook(None if savepoint is None else lambda: True)


def _refuse_binding(cursor: _Cursor, number: int, value: object) -> NoReturn:
    """Raise BindingsError for a type that SQLite can't store. By default, apsw raises TypeError."""
    raise apsw.BindingsError(f"parameter {number} is of the type {type(value).__name__}")


def connect(database: str = ":memory:", *, uri: bool = False, timeout: float = 5.0) -> Connection:
    """Open or create a SQLite file. With `uri=True`, open the existing file of a URI (https://sqlite.org/uri.html). The
    timeout for a lock is in seconds.
    """
    how = apsw.SQLITE_OPEN_URI if uri else apsw.SQLITE_OPEN_CREATE
    connection = Connection(database, apsw.SQLITE_OPEN_READWRITE | how)
    try:
        connection.cursor_factory = Cursor
        connection.convert_binding = _refuse_binding
        connection.set_busy_timeout(int(timeout * 1000))
        # Keep temporary data in memory. A container can lack a directory for temporary files
        # (https://sqlite.org/tempfiles.html).
        connection.execute("PRAGMA temp_store=MEMORY")
        # Make SQLite keep query plans. By default, each execution with a LIMIT parameter makes a new plan
        # (https://sqlite.org/queryplanner-ng.html#qpstab).
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    except BaseException:
        connection.close()  # a traceback of an interrupt can keep the connection in memory
        raise
    return connection


def open_existing(path: Path, options: str, *, timeout: float = 5.0) -> Connection:
    """Open an existing file with options of SQLite's URIs, such as `mode=ro`."""
    return connect(f"file:{quote(os.fsencode(path))}?{options}", uri=True, timeout=timeout)


def deny_attach(operation: int, *names: str | None) -> int:
    """Authorize every action except ATTACH and DETACH (https://sqlite.org/c3ref/set_authorizer.html)."""
    return apsw.SQLITE_DENY if operation in (apsw.SQLITE_ATTACH, apsw.SQLITE_DETACH) else apsw.SQLITE_OK


class Undecodable(bytes):
    """The bytes of a stored text that is not UTF-8."""


def undecoded_columns(names: Iterable[str]) -> str:
    """Return SQL expressions for the type and the value of each column. A text is read as bytes. Pass names that are
    quoted for SQL.
    """
    return ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END" for name in names
    )


def decoded_row(row: Sequence[Any]) -> list[Any]:
    """Decode a row of a SELECT whose expressions come from `undecoded_columns()`."""
    return [_decoded(value) if kind == "text" else value for kind, value in zip(row[::2], row[1::2], strict=True)]


def _decoded(value: bytes) -> str | Undecodable:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return Undecodable(value)


def _regexp(pattern: Any, value: Any) -> bool | None:
    try:
        return None if value is None else re.search(pattern, value) is not None
    except (re.error, TypeError) as error:
        raise apsw.SQLError(f"regexp: {error}") from None


# Map apsw's exceptions to SQLAlchemy's error classes. Omit the suffix "Error" in the names of apsw's exceptions. For
# other exceptions of apsw, SQLAlchemy raises its own DatabaseError.
_SQLALCHEMY_ERRORS = {
    "IntegrityError": "Constraint Mismatch",
    "DataError": "TooBig",
    "ProgrammingError": "Range Misuse Bindings ConnectionClosed CursorClosed ThreadingViolation IncompleteExecution",
    "OperationalError": "SQL Busy Locked ReadOnly IO Full CantOpen Protocol Interrupt Abort SchemaChange NoMem "
    "Permissions Auth NoLFS NotFound",
}


class Dialect(SQLiteDialect):
    """SQLAlchemy's SQLite dialect on apsw (https://docs.sqlalchemy.org/en/21/core/internals.html)."""

    driver = "homeagent"
    default_paramstyle = "qmark"
    supports_statement_cache = True
    returns_native_bytes = True
    poolclass = SingletonThreadPool  # Each thread keeps its own in-memory database.
    # SQLAlchemy selects its error class by the driver's class name
    # (https://docs.sqlalchemy.org/en/21/core/exceptions.html).
    dbapi_exception_translation_map: dict[str, str] = {
        f"{name}Error": kind for kind, names in _SQLALCHEMY_ERRORS.items() for name in names.split()
    } | {"Error": "DatabaseError"}
    _isolation_lookup = SQLiteDialect._isolation_lookup.union({"AUTOCOMMIT": None})

    @classmethod
    def import_dbapi(cls) -> Any:
        """Return this module, which implements the DB-API."""
        import homeagent.engine.sqlite.dialect as module

        return module

    def on_connect(self) -> Callable[[Any], None]:
        """Return a function that adds `regexp()` for SQLAlchemy's `regexp_match()`."""
        return lambda connection: connection.create_scalar_function("regexp", _regexp, 2, deterministic=True)

    def do_begin(self, dbapi_connection: Any) -> None:
        """Send BEGIN, unless a listener has already begun the transaction."""
        if not dbapi_connection.autocommit and not dbapi_connection.in_transaction:
            dbapi_connection.execute("BEGIN")

    def do_rollback_to_savepoint(self, connection: Any, name: str) -> None:
        """Roll back to a savepoint. If SQLite has already rolled back the whole transaction, do nothing."""
        if connection.connection.driver_connection.in_transaction:
            # SQLAlchemy's method has no annotations.
            super().do_rollback_to_savepoint(connection, name)  # type: ignore[no-untyped-call]

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        """Set an isolation level of SQLAlchemy, such as `AUTOCOMMIT`."""
        dbapi_connection.autocommit = level == "AUTOCOMMIT"
        if not dbapi_connection.autocommit:
            super().set_isolation_level(dbapi_connection, level)

    def detect_autocommit_setting(self, dbapi_conn: Any) -> bool:
        """Return True if the connection is in autocommit mode."""
        return bool(dbapi_conn.autocommit)

    def _get_server_version_info(self, connection: Any) -> tuple[int, ...]:
        return sqlite_version_info


registry.register(DRIVER_NAME.replace("+", "."), __name__, "Dialect")
