"""The one place where a driver's exception becomes one of ours.

A driver's message may carry values: psycopg puts the offending row into DETAIL. So what is raised here names the
kind of fault and its remedy only, and the driver's own exception is neither its cause nor its context.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from homeagent.errors import (
    CommitUnknownError,
    ConflictError,
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DatabaseClosedError,
    DatabaseError,
    DatabaseIOError,
    DatabaseMovedError,
    DiskFullError,
    HomeAgentError,
    InsecureFileError,
    InvalidArgumentError,
    ReadOnlyError,
)

__all__ = [
    "StandbyError",
    "TransientError",
    "Translate",
    "commit_unknown",
    "postgresql_fault",
    "sqlite_fault",
    "translated",
]

RESTORE = "stop, keep it aside with its -wal and -shm, and restore the newest good backup"
"""What to do about a damaged file."""

Translate = Callable[[BaseException], HomeAgentError]


class TransientError(DatabaseBusyError):
    """The unit met another one and may succeed when it is run again whole: `Database.run` does that.

    `sqlstate` is what a PostgreSQL server called it.
    """

    sqlstate: str | None = None


class StandbyError(ReadOnlyError):
    """The server takes no writes: it is a standby, or a primary that was demoted. Another one may take them soon."""

    def __init__(self) -> None:
        super().__init__(
            "the PostgreSQL server is a standby and takes no writes: name all hosts in the URL, with "
            "target_session_attrs=read-write, so that the primary is found"
        )


def commit_unknown() -> CommitUnknownError:
    """Return the error for a connection that was lost between COMMIT and its answer."""
    return CommitUnknownError(
        "the connection was lost in the middle of COMMIT, so that nobody knows whether the unit took place: "
        "look whether it did before it is done again, or use run(…, idempotent=True) for a unit that may be done twice"
    )


# https://sqlite.org/rescode.html: the low byte is the primary result code, which an extended one says more than.
_SQLITE_FAULTS: dict[int, tuple[type[HomeAgentError], str]] = {
    sqlite3.SQLITE_BUSY: (
        TransientError,
        "the database is locked by another process for longer than busy_timeout: run the unit again",
    ),
    sqlite3.SQLITE_LOCKED: (TransientError, "the database is locked within this process: run the unit again"),
    sqlite3.SQLITE_PROTOCOL: (TransientError, "other processes keep opening the database: run the unit again"),
    sqlite3.SQLITE_FULL: (
        DiskFullError,
        "the disk is full, or the file may not grow: make room, then run the unit again",
    ),
    sqlite3.SQLITE_READONLY: (
        ReadOnlyError,
        "the database can't be written: it is a read-only unit, file or file system",
    ),
    sqlite3.SQLITE_READONLY_DBMOVED: (
        DatabaseMovedError,
        "the database file was deleted, moved or replaced while it was open: put it back, or restore a backup",
    ),
    sqlite3.SQLITE_READONLY_DIRECTORY: (
        ReadOnlyError,
        "the directory of the database can't be written, where its log belongs: mend its owner and mode",
    ),
    sqlite3.SQLITE_PERM: (ReadOnlyError, "access to the database file was denied: mend its owner and mode"),
    sqlite3.SQLITE_CORRUPT: (CorruptDatabaseError, f"the database file is damaged: {RESTORE}"),
    sqlite3.SQLITE_NOTADB: (CorruptDatabaseError, f"the file is no SQLite database: check the path, or {RESTORE}"),
    sqlite3.SQLITE_CANTOPEN: (
        DatabaseError,
        "a file of the database can't be opened: check that it is there, its permissions and those of its directory",
    ),
    sqlite3.SQLITE_CANTOPEN_SYMLINK: (
        InsecureFileError,
        "a symbolic link is in the place of a file of the database: remove it",
    ),
    sqlite3.SQLITE_IOERR: (
        DatabaseIOError,
        "the operating system failed to read or write the database: check the disk and the system's log",
    ),
    sqlite3.SQLITE_IOERR_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    sqlite3.SQLITE_IOERR_CORRUPTFS: (
        CorruptDatabaseError,
        f"the file system is damaged: check it; {RESTORE}",
    ),
    sqlite3.SQLITE_IOERR_SHORT_READ: (
        CorruptDatabaseError,
        f"the database file or its log ends too early: {RESTORE}",
    ),
    sqlite3.SQLITE_NOLFS: (DatabaseIOError, "the file is larger than this system can handle"),
    sqlite3.SQLITE_NOMEM: (DatabaseError, "SQLite ran out of memory"),
    sqlite3.SQLITE_CONSTRAINT: (
        ConflictError,
        "a constraint of the database refused the change: a duplicate, a missing reference or a value out of range",
    ),
    sqlite3.SQLITE_INTERRUPT: (DatabaseError, "the statement was interrupted"),
    sqlite3.SQLITE_TOOBIG: (InvalidArgumentError, "a value is too large for the database"),
}


def sqlite_fault(error: BaseException) -> HomeAgentError:
    """Return ours for an exception of `sqlite3` or `pysqlite3`, told apart by SQLite's extended result code.

    Args:
        error: the driver's exception.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # First, since the driver's message quotes the text. Python's own exception is for names, and for messages of
        # SQLite's that quote a damaged schema. SQLAlchemy keeps either as the cause, so the text is removed.
        if isinstance(error, UnicodeDecodeError) or str(error).startswith("Could not decode to UTF-8"):
            error.args = ()
            if isinstance(error, UnicodeDecodeError):
                error.object = b""
            return CorruptDatabaseError(f"a stored text is not UTF-8: the database is damaged, {RESTORE}")
        if "closed" in str(error):
            return DatabaseClosedError("the database was closed: open it again")
        if isinstance(error, OverflowError) or "too large" in str(error):
            return InvalidArgumentError("a number is outside of 64 bits")
        return DatabaseError(f"the SQLite driver refused the statement ({type(error).__name__})")
    found = _SQLITE_FAULTS.get(code) or _SQLITE_FAULTS.get(code & 0xFF)
    kind, message = found or (DatabaseError, "SQLite refused the statement")
    name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    return kind(f"{message} [{name}]")


def postgresql_fault(error: BaseException) -> HomeAgentError:
    """Return ours for an exception of psycopg, told apart by its SQLSTATE.

    Args:
        error: the driver's exception.

    Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    state = getattr(error, "sqlstate", None)
    if state is None:
        # Refused, reset or closed: psycopg has no SQLSTATE where no server answered.
        return ConnectionLostError("the PostgreSQL server can't be reached or went away: check it, then run again")
    label = f" [SQLSTATE {state}]"
    if state in {"40001", "40P01"}:
        return TransientError("the unit met another one (serialization failure or deadlock): run it again" + label)
    if state in {"55P03", "57014"}:
        busy = TransientError("a lock was not given in time: run the unit again" + label)
        busy.sqlstate = state
        return busy
    if state.startswith("08") or state in {"57P01", "57P02", "57P03"}:
        return ConnectionLostError("the PostgreSQL server closed the connection or is starting: run again" + label)
    if state in {"25006", "42501"}:
        return ReadOnlyError("the database can't be written: a read-only unit, server or role" + label)
    if state in {"53100", "53400"}:
        return DiskFullError("the PostgreSQL server has no room to write: make some, then run the unit again" + label)
    if state.startswith("53"):
        return TransientError("the PostgreSQL server has no connection or memory left: lower the pools" + label)
    if state.startswith("23"):
        return ConflictError(
            "a constraint of the database refused the change: a duplicate, a missing reference or a value out of range"
            + label
        )
    if state in {"XX001", "XX002"}:
        return CorruptDatabaseError("the PostgreSQL server reports damaged data: restore it from a backup" + label)
    return DatabaseError("PostgreSQL refused the statement" + label)


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
