"""Translate exceptions of a driver. homeagent's errors contain no stored values and no driver exceptions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apsw
from sqlalchemy.exc import InvalidRequestError

from homeagent.errors import (
    CommitUnknownError,
    ConflictError,
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseClosedError,
    DatabaseError,
    DatabaseIOError,
    DatabaseMovedError,
    DiskFullError,
    HomeAgentError,
    InsecureFileError,
    InvalidArgumentError,
    ReadOnlyError,
    TransientError,
    UnitStateError,
)
from homeagent.models import TABLES

RESTORE = "stop, keep the file with its -wal and -shm, and restore the newest good backup"

_AGAIN = "run the unit again"
_CLOSED = "the database was closed: open it again"
_REFUSED = "a constraint of the database refused the change: a duplicate, a missing reference or a value out of range"

_NOT_IN_TIME = ("55P03", "57014")
"""PostgreSQL's error codes (SQLSTATE) for a lock timeout and a cancelled statement."""

SESSION_ENDED = frozenset({"FATAL", "PANIC"})
"""Severities of PostgreSQL errors that end the session, with any SQLSTATE."""

Translate = Callable[[BaseException], HomeAgentError]


# Match messages of SQLite and PostgreSQL that contain names from the schema. In a message with a value, the group
# captures only the other text. By mistake, a programmer can write a value in double quotes. The database then reports
# the value as a missing column. No pattern may match such a message.
_NAMING = re.compile(
    r"""no\ such\ (?:table|index|view|trigger|function|module|savepoint|database|collation\ sequence):\ .+
    | no\ such\ column:\ (?:[^"]+|"[^"]+")
    | table\ .+\ has\ no\ column\ named\ .+
    | (?:table\ .+\ has\ \d+|\d+\ values\ for\ \d+)\ columns(?:\ but\ \d+\ values\ were\ supplied)?
    | foreign\ key\ mismatch\ -\ ".+"\ referencing\ ".+"
    | (?:error\ in\ (?:table|view|trigger|index)\ .+:\ )?(?:ambiguous|duplicate)\ column\ name:\ .+
    | error\ in\ (?:table|view|trigger|index)\ .+:\ no\ such\ (?:table:\ .+|column:\ [^"]+)
    | (?:table|view|index|trigger)\ .+\ already\ exists
    | there\ is\ already\ (?:an?\ (?:index|table)\ named|another\ table\ or\ index\ with\ this\ name:)\ .+
    | use\ DROP\ (?:TABLE|VIEW)\ to\ delete\ (?:table|view)\ .+
    | object\ name\ reserved\ for\ internal\ use:\ .+
    | Cannot\ add\ a\ (?:NOT\ NULL|PRIMARY\ KEY|UNIQUE|REFERENCES)?\ ?column(?:\ with\ [\w -]+)?
    | cannot\ (?:modify\ .+\ because\ it\ is\ a\ view|drop\ (?:PRIMARY\ KEY|UNIQUE)\ column:\ ".+")
    | (?:near\ ".*":\ )?(syntax\ error)(?:\ at\ or\ near\ .*)?
    | (invalid\ input\ value\ for\ enum\ [^:]+)(?::\ .*)?
    | (?:permission\ denied\ for|must\ be\ owner\ of)\ (?:table|view|sequence|schema|function|index|type)\ .+
    | (?:table|view|sequence|index)\ "[\w.]+"\ does\ not\ exist
    | column\ (?:\w+\.\w+|".+"\ of\ relation\ ".+")\ does\ not\ exist
    | index\ row\ (?:size\ \d+\ exceeds\ .+\ for\ index\ ".+"|requires\ \d+\ bytes,\ maximum\ size\ is\ \d+)""",
    re.VERBOSE,
)
# Error codes of PostgreSQL (SQLSTATE) for definitions. The first line of the message contains only names and types.
_DEFINITIONS = ("25001", "2BP01", "42701", "42710", "42723", "42830", "42P01", "42P06", "42P07", "42P16")
# For these codes, a name is in the SQL text only if the message has a position. A cast of a value has no position.
_NAMES = ("3F000", "42704", "42804", "42809", "42883")
# PostgreSQL has one code for all values that are too long. Only an error of an index names an index.
_TOO_LONG = "54000"
_IN_OBJECT = re.compile(r"error in (view|trigger) ")
_IN_OBJECT_REMEDY = " (drop the {0} first, and create the {0} again at the end)"
_MISSING = re.compile(r"no such (?:table|column): |(?:relation|column) .* does not exist")
_MISSING_REMEDY = (
    " (if the table is the application's, create the table by a revision, and pass migrations= to Database.open)"
)
_MISSING_TABLE = re.compile(r'no such table: (?:main\.)?(\w+)|relation "(\w+)" does not exist')
_LOST_REMEDY = " (homeagent's table was deleted: restore the newest good backup)"


def message_with_name(error: BaseException) -> str:
    """Return the database's message. If the message can contain a stored value, return an empty text."""
    shown: str | None = getattr(error, "shown", None)
    if shown is not None:
        return shown
    first, *_ = str(error).splitlines() or [""]
    sqlstate, place = getattr(error, "sqlstate", None), getattr(error, "diag", None)
    names_index = sqlstate == _TOO_LONG and refused_by(error)[1] is not None
    if place is not None and (
        sqlstate in _DEFINITIONS or names_index or (sqlstate in _NAMES and place.statement_position)
    ):
        # A function of PL/pgSQL can use a stored value as a name.
        return "" if place.context or place.internal_query else first
    if first.startswith("no such column") and getattr(error, "error_offset", 0) < 0:
        return ""  # FTS5 reports a word of the searched text as a missing column, without a place in the SQL text
    found = _NAMING.fullmatch(first)
    return str(found[found.lastindex or 0]) if found else ""


def named(error: BaseException) -> str:
    """Return the database's message as a suffix for homeagent's message. Add a remedy for a missing table or column."""
    message = message_with_name(error)
    broken = _IN_OBJECT.match(message)
    if broken is not None:
        return f": {message}{_IN_OBJECT_REMEDY.format(broken[1])}"
    table = _MISSING_TABLE.fullmatch(message)
    remedy = _LOST_REMEDY if table is not None and (table[1] or table[2]) in TABLES else _MISSING_REMEDY
    return (f": {message}" if message else "") + (remedy if _MISSING.search(message) else "")


def naming_statement(error: HomeAgentError, sql: str) -> HomeAgentError:
    """Add the SQL text to an error of the exact class DatabaseError. The SQL text contains no stored values."""
    if type(error) is not DatabaseError:
        return naming_table(error, sql)
    return DatabaseError(f"{error}; the statement was: {' '.join(sql.split())}")


_WRITTEN = re.compile(r'\s*(?:INSERT\s+INTO|UPDATE)\s+"?([\w.]+)', re.IGNORECASE)


def naming_table(error: HomeAgentError, sql: str | None) -> HomeAgentError:
    """Add the statement's table to the error for a value that is too long for an index."""
    label = f" [SQLSTATE {_TOO_LONG}]"
    message, found = str(error), _WRITTEN.match(sql or "")
    if (
        found is None
        or type(error) is not InvalidArgumentError
        or not message.endswith(label)
        or " of table " in message
    ):
        return error
    return InvalidArgumentError(f"{message.removesuffix(label)} of table {found[1]!r}{label}")


def connection_lost() -> ConnectionLostError:
    """Return the error for a lost connection or an unreachable server."""
    return ConnectionLostError(
        "the PostgreSQL server can't be reached, or the connection ended: check the server, then run the unit again"
    )


def commit_unknown(cause: str = "the connection was lost in the middle of COMMIT") -> CommitUnknownError:
    """Return the error for a COMMIT whose result is unknown."""
    return CommitUnknownError(
        f"{cause}, so it is unknown whether the unit was committed: check whether its rows exist before you repeat it, "
        "or use run(…, idempotent=True) for a unit that may be committed twice"
    )


def transaction_ended() -> UnitStateError:
    """Return the error for a unit whose transaction has ended before the end of the unit."""
    return UnitStateError(
        "the transaction of this unit of work has ended early, by an error of the database, by SQL such as COMMIT or "
        "because the connection was closed: begin another unit"
    )


_REASONS = {
    "unique": "another row has the same value",
    "not_null": "a value is missing",
    "check": "a value is out of range",
    "foreign_key": "a referenced row is missing, or other rows refer to the row",
    "exclusion": "another row excludes the value",
    "datatype": "a value is of another type",
}


def constraint_conflict(kind: str, table: str | None, constraint: str | None, label: str) -> ConflictError:
    """Return the error for a violated constraint. The argument `label=` is the error's code, such as SQLSTATE 23505."""
    name = f"a {kind} constraint" if constraint is None else f"the {kind} constraint {constraint!r}"
    owner = "the database" if table is None else f"table {table!r}"
    error = ConflictError(f"{name} of {owner} refused the change: {_REASONS[kind]} [{label}]")
    error.table, error.constraint, error.kind = table, constraint, kind
    return error


# The low byte of an extended code is the primary code (https://sqlite.org/rescode.html).
_SQLITE_ERRORS: dict[int, tuple[type[HomeAgentError], str]] = {
    apsw.SQLITE_BUSY: (
        TransientError,
        f"the database was locked by another process for longer than busy_timeout: {_AGAIN}",
    ),
    apsw.SQLITE_LOCKED: (TransientError, f"the database is locked within this process: {_AGAIN}"),
    apsw.SQLITE_PROTOCOL: (TransientError, f"other processes keep opening the database: {_AGAIN}"),
    apsw.SQLITE_FULL: (DiskFullError, f"the disk is full, or the file can't grow further: make room, then {_AGAIN}"),
    apsw.SQLITE_READONLY: (
        ReadOnlyError,
        "the database can't be written: the unit, the file or the file system is read-only",
    ),
    apsw.SQLITE_READONLY_DBMOVED: (
        DatabaseMovedError,
        "the database file was deleted, moved or replaced while it was open: put it back, or restore a backup",
    ),
    apsw.SQLITE_READONLY_DIRECTORY: (
        ReadOnlyError,
        "the directory of the database can't be written, so SQLite can't create the WAL: correct its owner and mode",
    ),
    apsw.SQLITE_PERM: (ReadOnlyError, "access to the database file was denied: correct its owner and mode"),
    apsw.SQLITE_CORRUPT: (CorruptDatabaseError, f"the database file is damaged: {RESTORE}"),
    apsw.SQLITE_NOTADB: (CorruptDatabaseError, f"the file is not a SQLite database: check the path, or {RESTORE}"),
    apsw.SQLITE_CANTOPEN: (
        DatabaseError,
        "a file of the database can't be opened: check that it exists, and the permissions of file and directory",
    ),
    apsw.SQLITE_CANTOPEN_SYMLINK: (
        InsecureFileError,
        "a symbolic link has the name of a file of the database: remove the link",
    ),
    apsw.SQLITE_IOERR: (
        DatabaseIOError,
        "the operating system failed to read or write the database: check the disk and the system's log",
    ),
    apsw.SQLITE_IOERR_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    apsw.SQLITE_IOERR_CORRUPTFS: (CorruptDatabaseError, f"the file system is damaged: check it; {RESTORE}"),
    apsw.SQLITE_IOERR_SHORT_READ: (CorruptDatabaseError, f"the database file or its WAL ends too early: {RESTORE}"),
    apsw.SQLITE_NOLFS: (DatabaseIOError, "the file is larger than this system can handle"),
    apsw.SQLITE_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    apsw.SQLITE_CONSTRAINT: (ConflictError, _REFUSED),
    apsw.SQLITE_INTERRUPT: (DatabaseError, "the statement was interrupted"),
    apsw.SQLITE_TOOBIG: (InvalidArgumentError, "a value is too large for the database"),
}


# Exceptions without a SQLite result code.
_DRIVER_ERRORS: dict[type[BaseException], tuple[type[HomeAgentError], str]] = {
    apsw.ConnectionClosedError: (DatabaseClosedError, _CLOSED),
    apsw.CursorClosedError: (DatabaseClosedError, _CLOSED),
    apsw.ThreadingViolationError: (
        UnitStateError,
        "two threads used this unit of work at the same time: use a unit in one thread at a time",
    ),
    UnicodeDecodeError: (CorruptDatabaseError, f"a stored text is not UTF-8: the database is damaged, {RESTORE}"),
    UnicodeEncodeError: (InvalidArgumentError, "a text holds half of a surrogate pair, which UTF-8 can't encode"),
    OverflowError: (InvalidArgumentError, "an integer does not fit into 64 bits"),
}


def _remove_text(error: BaseException) -> None:
    """Remove the text from a UnicodeError, because a traceback can show the driver's exception."""
    if isinstance(error, UnicodeError):
        error.args = ()
    if isinstance(error, UnicodeEncodeError):
        error.object = ""
    elif isinstance(error, UnicodeDecodeError):
        error.object = b""


def sqlite_error(error: BaseException) -> HomeAgentError:
    """Return homeagent's error for an exception of apsw."""
    code = getattr(error, "extendedresult", None)
    if code is None:
        _remove_text(error)
        for driver_error, (kind, message) in _DRIVER_ERRORS.items():
            if isinstance(error, driver_error):
                return kind(message)
        return DatabaseError(f"the SQLite driver refused the statement ({type(error).__name__})")
    found = _SQLITE_ERRORS.get(code) or _SQLITE_ERRORS.get(code & 0xFF)
    kind, message = found or (DatabaseError, f"SQLite refused the statement{named(error)}")
    return kind(f"{message} [{sqlite_code_name(error)}]")


def sqlite_code(error: BaseException) -> int:
    """Return the primary result code of SQLite's error. For another error, return 0."""
    return int(getattr(error, "extendedresult", None) or 0) & 0xFF


def sqlite_code_name(error: BaseException) -> str:
    """Return the name of SQLite's extended result code, such as `SQLITE_IOERR_READ`."""
    code = int(getattr(error, "extendedresult", None) or apsw.SQLITE_ERROR)
    names = apsw.mapping_extended_result_codes, apsw.mapping_result_codes
    return str(names[0].get(code) or names[1].get(code & 0xFF, "SQLITE_ERROR"))


_POSTGRESQL_CONSTRAINTS = {
    "23001": "foreign_key",
    "23502": "not_null",
    "23503": "foreign_key",
    "23505": "unique",
    "23514": "check",
    "23P01": "exclusion",
}

_ENDED = ("08", "57P", "25P03", "25P04")
_READ_ONLY = ("25006", "42501")
_DAMAGED = ("XX001", "XX002")
# Each entry begins with prefixes of SQLSTATE codes. The first matching entry determines the error.
_POSTGRESQL_ERRORS: tuple[tuple[tuple[str, ...], type[HomeAgentError], str], ...] = (
    (("40001", "40P01"), TransientError, f"serialization failure or deadlock with another unit: {_AGAIN}"),
    (_NOT_IN_TIME, TransientError, f"a lock was not available in time: {_AGAIN}"),
    # The server restarted, failed over, or ended a session after a timeout.
    (_ENDED, ConnectionLostError, f"the PostgreSQL server closed the connection or is starting: {_AGAIN}"),
    (_READ_ONLY, ReadOnlyError, "the database can't be written: the unit, the server or the role is read-only"),
    (("53100", "53400"), DiskFullError, f"the PostgreSQL server has no room to write: make room, then {_AGAIN}"),
    (("53",), TransientError, "the PostgreSQL server is out of connections or memory: lower pool_size"),
    (("22003",), InvalidArgumentError, "a number is out of the range of its type: pass a smaller number"),
    # 44000 is a row that violates the check option of a view.
    (("23", "44"), ConflictError, _REFUSED),
    (("58030",), DatabaseIOError, "the PostgreSQL server failed to read or write a file: check its disk and its log"),
    (
        (_TOO_LONG,),
        InvalidArgumentError,
        "a value is too long for an index (at most 2,704 bytes): shorten the value, or index a hash of the value",
    ),
    (_DAMAGED, CorruptDatabaseError, "the PostgreSQL server reports damaged data: restore it from a backup"),
)


def refused_by(error: BaseException) -> tuple[str | None, str | None]:
    """Return the table's name, and the name of the constraint or column. A missing name is None."""
    kept: tuple[str | None, str | None] | None = getattr(error, "constraint", None)
    if kept is not None:
        return kept
    diag: Any = getattr(error, "diag", None)
    name = getattr(diag, "constraint_name", None) or getattr(diag, "column_name", None)
    return getattr(diag, "table_name", None), name


def postgresql_error(error: BaseException) -> HomeAgentError:
    """Translate an exception of psycopg (https://www.postgresql.org/docs/current/errcodes-appendix.html)."""
    state = getattr(error, "sqlstate", None)
    if state is None:
        return _psycopg_error(error)
    label = f"SQLSTATE {state}"
    if state in _POSTGRESQL_CONSTRAINTS:
        return constraint_conflict(_POSTGRESQL_CONSTRAINTS[state], *refused_by(error), label)
    found = next((entry[1:] for entry in _POSTGRESQL_ERRORS if state.startswith(entry[0])), None)
    if state == _TOO_LONG and refused_by(error)[1] is None and not message_with_name(error):
        found = None  # another limit, such as the length of a word in a tsquery
    if found is None and getattr(getattr(error, "diag", None), "severity_nonlocalized", None) in SESSION_ENDED:
        found = ConnectionLostError, f"the PostgreSQL server ended the session: {_AGAIN}"
    kind, message = found or (DatabaseError, "PostgreSQL refused the statement")
    table = refused_by(error)[0] if state == _TOO_LONG else None
    failure = kind(f"{message}{named(error)}{'' if table is None else f' of table {table!r}'} [{label}]")
    if isinstance(failure, TransientError) and state in _NOT_IN_TIME:
        failure.sqlstate = state
    return failure


def remove_private(error: Any) -> None:
    """Remove the database's message from the driver's exception. The message can show a row. The attributes `_info` and
    `_pgconn` of psycopg's exception contain private data too, such as the password.
    """
    if hasattr(error, "sqlstate"):
        error.constraint = refused_by(error)  # read by `refused_by()`
        error.shown = message_with_name(error)  # read by `message_with_name()`
        error.args = (error.shown or "the server's message is withheld",)
        error._info = error._pgconn = None
    elif isinstance(error, apsw.Error):
        error.args = (message_with_name(error) or "SQLite's message is withheld",)


def unconvertible(
    kind: type[BaseException], what: str = "a value or a default of the statement"
) -> InvalidArgumentError:
    """Return the error for a value that a column type refused by an exception of the given class."""
    return InvalidArgumentError(f"{what} can't be converted ({kind.__name__}): pass a value of the column's type")


def conversion_error(original: Any) -> InvalidArgumentError:
    """Return homeagent's error for an exception before a statement of SQLAlchemy runs, such as a default's exception.
    Remove the value from the exception, which becomes the cause of the error.
    """
    if type(original) is InvalidRequestError:
        return InvalidArgumentError(original.args[0])  # names a parameter without a value
    _remove_text(original)
    original.args = ("the message is withheld",)
    if isinstance(original, AttributeError):
        original.obj = None
    original.__cause__ = original.__context__ = None
    return unconvertible(type(original))


def _psycopg_error(error: BaseException) -> HomeAgentError:
    """Return homeagent's error for a driver's exception without a SQLSTATE."""
    _remove_text(error)
    # Compare class names (PEP 249). A SQLite store must work without psycopg.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OverflowError", "UnicodeError", "DataError"}:
        return InvalidArgumentError("a value can't be stored by PostgreSQL, such as a text with a NUL or a surrogate")
    if kinds & {"ProgrammingError", "NotSupportedError"}:
        return DatabaseError(f"psycopg refused the statement ({type(error).__name__})")
    return connection_lost()


@contextmanager
def translated(driver_errors: tuple[type[BaseException], ...], translate: Translate) -> Iterator[None]:
    """Raise homeagent's error in place of an exception of the driver. The error has no cause or context."""
    translation: HomeAgentError | None = None
    try:
        yield
    except driver_errors as error:
        translation = translate(error)
        remove_private(error)  # a frame of contextlib keeps the exception
    except HomeAgentError as error:
        if not isinstance(error.__context__, driver_errors):
            raise
        translation = error  # a listener of SQLAlchemy has already translated the exception
    if translation is not None:
        try:
            raise translation
        finally:
            # Remove the driver's exception, which Python or SQLAlchemy has attached.
            translation.__cause__ = translation.__context__ = None
