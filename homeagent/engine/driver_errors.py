"""The one place where a driver's exception becomes one of ours.

A driver's message may carry values: psycopg puts the offending row into DETAIL. So an error raised here names the kind
of fault, its remedy, a part of the schema and the SQL text of homeagent's own statement only, and the driver's own
exception is neither its cause nor its context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apsw

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
)

__all__ = [
    "SESSION_ENDED",
    "Translate",
    "commit_unknown",
    "connection_lost",
    "constraint_conflict",
    "named",
    "naming_statement",
    "postgresql_error",
    "refused_by",
    "sqlite_code",
    "sqlite_code_name",
    "sqlite_error",
    "translated",
]

RESTORE = "stop, keep it aside with its -wal and -shm, and restore the newest good backup"
"""What to do about a damaged file."""

SESSION_ENDED = frozenset({"FATAL", "PANIC"})
"""The severities of a PostgreSQL error after which the session is gone, whatever the SQLSTATE."""

Translate = Callable[[BaseException], HomeAgentError]


# Messages of an engine that name a part of the schema and hold no value, whatever the statement was.
_NAMING = re.compile(
    r"""no\ such\ (table|column|index|view|function|module|savepoint):\ [\w.~]+
    | table\ \w+\ has\ no\ column\ named\ \w+
    | foreign\ key\ mismatch\ -\ "\w+"\ referencing\ "\w+"
    | error\ in\ (table|view|trigger|index)\ \w+(\ after\ [\w ]+)?:\ no\ such\ (table|column):\ [\w.~]+
    | (relation|table|view|sequence|index)\ "[\w.]+"\ does\ not\ exist
    | column\ (\w+\.\w+|"\w+"\ of\ relation\ "\w+")\ does\ not\ exist
    | permission\ denied\ for\ (table|view|sequence|schema|function)\ \w+""",
    re.VERBOSE,
)


def named(error: BaseException) -> str:
    """Return what a message of the engine names, after a colon; an empty text if the message may hold a value."""
    first, *_ = str(error).splitlines() or [""]
    return f": {first}" if _NAMING.fullmatch(first) else ""


def naming_statement(fault: HomeAgentError, sql: str) -> HomeAgentError:
    """Return the error of a statement of homeagent, with its SQL text if no class of error says what went wrong.

    Args:
        fault: the error.
        sql: the text, whose parameters are bound: it holds no value.
    """
    if type(fault) is not DatabaseError:
        return fault
    return DatabaseError(f"{fault}; the statement was: {' '.join(sql.split())}")


def connection_lost() -> ConnectionLostError:
    """Return the error for a connection that ended without an SQLSTATE of the server."""
    return ConnectionLostError("the PostgreSQL server can't be reached or went away: check it, then run again")


def commit_unknown(cause: str = "the connection was lost in the middle of COMMIT") -> CommitUnknownError:
    """Return the error for a COMMIT whose result is unknown.

    Args:
        cause: what happened; by default, the connection was lost between COMMIT and its answer.
    """
    return CommitUnknownError(
        f"{cause}, so that nobody knows whether the unit took place: look whether it did before it is done again, "
        "or use run(…, idempotent=True) for a unit that may be done twice"
    )


_REASONS = {
    "unique": "there is a row with the same value",
    "not_null": "a value is missing",
    "check": "a value is out of range",
    "foreign_key": "a row that is referred to is missing, or other rows refer to the row",
    "exclusion": "there is a row that excludes the value",
    "datatype": "a value is of another type",
}


def constraint_conflict(kind: str, table: str | None, constraint: str | None, label: str) -> ConflictError:
    """Return the error for a change that a constraint refused.

    Args:
        kind: of the constraint, as `ConflictError.kind` has it.
        table: the table that has the constraint; None if it is not known.
        constraint: its name, or its columns; None if it is not known.
        label: what the database calls the error.
    """
    name = f"a {kind} constraint" if constraint is None else f"the {kind} constraint {constraint!r}"
    where = "the database" if table is None else f"table {table!r}"
    error = ConflictError(f"{name} of {where} refused the change: {_REASONS[kind]} [{label}]")
    error.table, error.constraint, error.kind = table, constraint, kind
    return error


# https://sqlite.org/rescode.html: the low byte is the primary result code, which an extended one says more than.
_SQLITE_ERRORS: dict[int, tuple[type[HomeAgentError], str]] = {
    apsw.SQLITE_BUSY: (
        TransientError,
        "the database is locked by another process for longer than busy_timeout: run the unit again",
    ),
    apsw.SQLITE_LOCKED: (TransientError, "the database is locked within this process: run the unit again"),
    apsw.SQLITE_PROTOCOL: (TransientError, "other processes keep opening the database: run the unit again"),
    apsw.SQLITE_FULL: (
        DiskFullError,
        "the disk is full, or the file may not grow: make room, then run the unit again",
    ),
    apsw.SQLITE_READONLY: (
        ReadOnlyError,
        "the database can't be written: it is a read-only unit, file or file system",
    ),
    apsw.SQLITE_READONLY_DBMOVED: (
        DatabaseMovedError,
        "the database file was deleted, moved or replaced while it was open: put it back, or restore a backup",
    ),
    apsw.SQLITE_READONLY_DIRECTORY: (
        ReadOnlyError,
        "the directory of the database can't be written, where its log belongs: mend its owner and mode",
    ),
    apsw.SQLITE_PERM: (ReadOnlyError, "access to the database file was denied: mend its owner and mode"),
    apsw.SQLITE_CORRUPT: (CorruptDatabaseError, f"the database file is damaged: {RESTORE}"),
    apsw.SQLITE_NOTADB: (CorruptDatabaseError, f"the file is no SQLite database: check the path, or {RESTORE}"),
    apsw.SQLITE_CANTOPEN: (
        DatabaseError,
        "a file of the database can't be opened: check that it is there, its permissions and those of its directory",
    ),
    apsw.SQLITE_CANTOPEN_SYMLINK: (
        InsecureFileError,
        "a symbolic link is in the place of a file of the database: remove it",
    ),
    apsw.SQLITE_IOERR: (
        DatabaseIOError,
        "the operating system failed to read or write the database: check the disk and the system's log",
    ),
    apsw.SQLITE_IOERR_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    apsw.SQLITE_IOERR_CORRUPTFS: (
        CorruptDatabaseError,
        f"the file system is damaged: check it; {RESTORE}",
    ),
    apsw.SQLITE_IOERR_SHORT_READ: (
        CorruptDatabaseError,
        f"the database file or its log ends too early: {RESTORE}",
    ),
    apsw.SQLITE_NOLFS: (DatabaseIOError, "the file is larger than this system can handle"),
    apsw.SQLITE_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    apsw.SQLITE_CONSTRAINT: (
        ConflictError,
        "a constraint of the database refused the change: a duplicate, a missing reference or a value out of range",
    ),
    apsw.SQLITE_INTERRUPT: (DatabaseError, "the statement was interrupted"),
    apsw.SQLITE_TOOBIG: (InvalidArgumentError, "a value is too large for the database"),
}


# What apsw and Python raise before SQLite has seen a statement, or after SQLite has answered.
_DRIVER_FAULTS: dict[type[BaseException], tuple[type[HomeAgentError], str]] = {
    apsw.ConnectionClosedError: (DatabaseClosedError, "the database was closed: open it again"),
    apsw.CursorClosedError: (DatabaseClosedError, "the database was closed: open it again"),
    UnicodeDecodeError: (CorruptDatabaseError, f"a stored text is not UTF-8: the database is damaged, {RESTORE}"),
    UnicodeEncodeError: (InvalidArgumentError, "a text holds half of a surrogate pair, which UTF-8 can't encode"),
    OverflowError: (InvalidArgumentError, "a number is outside of 64 bits"),
}


def sqlite_error(error: BaseException) -> HomeAgentError:
    """Return homeagent's error for an exception of apsw, chosen by SQLite's extended result code.

    Args:
        error: the driver's exception.
    """
    code = getattr(error, "extendedresult", None)
    if code is None:
        if isinstance(error, UnicodeError):
            # Python's exception holds the text, and SQLAlchemy keeps the exception as the cause.
            error.args = ()
            error.object = "" if isinstance(error, UnicodeEncodeError) else b""  # type: ignore[attr-defined]
        for kind, fault in _DRIVER_FAULTS.items():
            if isinstance(error, kind):
                return fault[0](fault[1])
        return DatabaseError(f"the SQLite driver refused the statement ({type(error).__name__})")
    found = _SQLITE_ERRORS.get(code) or _SQLITE_ERRORS.get(code & 0xFF)
    kind, message = found or (DatabaseError, f"SQLite refused the statement{named(error)}")
    return kind(f"{message} [{sqlite_code_name(error)}]")


def sqlite_code(error: BaseException) -> int:
    """Return SQLite's primary result code of an error, or 0 if the error is not SQLite's."""
    return int(getattr(error, "extendedresult", None) or 0) & 0xFF


def sqlite_code_name(error: BaseException) -> str:
    """Return the name of SQLite's extended result code of an error, such as `SQLITE_IOERR_READ`."""
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


def refused_by(error: BaseException) -> tuple[str | None, str | None]:
    """Return the table and the constraint, or column, that an exception of psycopg names; None for what it does not."""
    kept: tuple[str | None, str | None] | None = getattr(error, "constraint", None)
    if kept is not None:
        return kept
    diag: Any = getattr(error, "diag", None)
    name = getattr(diag, "constraint_name", None) or getattr(diag, "column_name", None)
    return getattr(diag, "table_name", None), name


def postgresql_error(error: BaseException) -> HomeAgentError:
    """Return ours for an exception of psycopg, told apart by its SQLSTATE.

    Args:
        error: the driver's exception.

    Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    state = getattr(error, "sqlstate", None)
    if state is None:
        return _psycopg_error(error)
    label = f" [SQLSTATE {state}]"
    if state in {"40001", "40P01"}:
        return TransientError("the unit met another one (serialization failure or deadlock): run it again" + label)
    if state in {"55P03", "57014"}:
        busy = TransientError("a lock was not given in time: run the unit again" + label)
        busy.sqlstate = state
        return busy
    if state.startswith(("08", "57P")) or state in {"25P03", "25P04"}:
        # A restart, a failover, or one of the timeouts by which the server ends a session.
        return ConnectionLostError("the PostgreSQL server closed the connection or is starting: run again" + label)
    if state in {"25006", "42501"}:
        return ReadOnlyError(f"the database can't be written: a read-only unit, server or role{named(error)}{label}")
    if state in {"53100", "53400"}:
        return DiskFullError("the PostgreSQL server has no room to write: make some, then run the unit again" + label)
    if state.startswith("53"):
        return TransientError("the PostgreSQL server has no connection or memory left: lower the pools" + label)
    kind = _POSTGRESQL_CONSTRAINTS.get(state)
    if kind is not None:
        return constraint_conflict(kind, *refused_by(error), label.strip(" []"))
    if state.startswith("23"):
        return ConflictError(
            "a constraint of the database refused the change: a duplicate, a missing reference or a value out of range"
            + label
        )
    if state in {"XX001", "XX002"}:
        return CorruptDatabaseError("the PostgreSQL server reports damaged data: restore it from a backup" + label)
    if getattr(getattr(error, "diag", None), "severity_nonlocalized", None) in SESSION_ENDED:
        return ConnectionLostError("the PostgreSQL server ended the session: run again" + label)
    return DatabaseError(f"PostgreSQL refused the statement{named(error)}{label}")


def _psycopg_error(error: BaseException) -> HomeAgentError:
    """Return homeagent's error for an exception without an SQLSTATE: no server answered, or none was asked."""
    # By their names in DB-API (PEP 249): only the engine of PostgreSQL imports psycopg.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OverflowError", "DataError"}:
        return InvalidArgumentError("a value can't be stored by PostgreSQL, such as a text with a NUL")
    if kinds & {"ProgrammingError", "NotSupportedError"}:
        return DatabaseError(f"psycopg refused the statement ({type(error).__name__})")
    return connection_lost()


@contextmanager
def translated(driver_errors: tuple[type[BaseException], ...], translate: Translate) -> Iterator[None]:
    """Raise ours instead of the driver's exception, with nothing of the driver's in its chain."""
    fault: Any = None
    try:
        yield
    except driver_errors as error:
        fault = translate(error)
    if fault is not None:
        raise fault
