"""Who has a database open: each of ours holds a shared lock beside it, so that a restore never swaps it under anybody.

The lock is on a file of its own, `homeagent.db.open`. It says nothing about the database's content, so it works
where that is damaged, and it goes with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from homeagent.engine.files.database_file import OPEN_FLAGS
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.replacement import finish_replacement
from homeagent.errors import DatabaseBusyError, DatabaseError, ReadOnlyError

__all__ = ["alone", "hold_in_use_lock", "in_use_path", "kept_from_sqlite"]

# Where SQLite takes its locks in a database file (https://sqlite.org/src/file/src/os.h): one byte each for PENDING
# and RESERVED, then those of SHARED, one of which a connection in write-ahead-log mode holds until it is closed.
_SQLITE_LOCKS = (0x40000000, 512)


def in_use_path(database: Path) -> Path:
    """Return the lock file that every open database holds."""
    return database.with_name(database.name + ".open")


def hold_in_use_lock(database: Path, *, timeout: timedelta) -> FileLock | None:
    """Hold the lock of those who have a database open, after the end of a restore that was cut off.

    Args:
        database: the file.
        timeout: how long to wait for a restore that is under way.

    Returns:
        The lock, to be released once the last connection is closed. None where its file can't be made, since the
        directory can't be written: then nothing can be swapped there either, nor could SQLite write.

    Raises:
        DatabaseBusyError: it is being restored.
        DatabaseError: the lock file is not as it must be, or a restore can't be finished.
    """
    path = in_use_path(database)
    while True:
        lock = FileLock(path, timeout=timeout, shared=True)
        try:
            lock.acquire()
        except ReadOnlyError:
            return None
        except DatabaseError as error:
            if isinstance(error.__cause__, PermissionError) and not os.access(database.parent, os.W_OK):
                return None
            raise
        if not lock.has_marker():
            return lock
        # Only who holds it alone may do that, and nobody else can have the database open: they all pass by here.
        lock.release()
        with FileLock(path, timeout=timeout) as only:
            finish_replacement(only, database, timeout=timeout)


@contextmanager
def alone(database: Path, *, timeout: timedelta) -> Iterator[FileLock]:
    """Keep everybody of ours from having a database open, after the end of a restore that was cut off.

    Args:
        database: the file, which may be absent or damaged; its directory exists.
        timeout: how long to wait for who has it open.

    Raises:
        DatabaseBusyError: it is open; the message says in which processes, where that can be known.
    """
    lock = FileLock(in_use_path(database), timeout=timeout)
    try:
        lock.acquire()
    except DatabaseBusyError:
        raise DatabaseBusyError(
            f"{quoted(database)} is open in {_holders(lock.path)}: stop what uses it, then restore it"
        ) from None
    try:
        finish_replacement(lock, database, timeout=timeout)
        yield lock
    finally:
        lock.release()


@contextmanager
def kept_from_sqlite(database: Path) -> Iterator[None]:
    """Keep other programs that use SQLite from having a file open. One that is absent is let be.

    Only for a file that this process does not have open through SQLite: closing any descriptor of it would drop
    SQLite's locks, and a descriptor that SQLite closes meanwhile drops these.

    Raises:
        DatabaseBusyError: one has it open.
    """
    with explained("open", database):
        try:
            descriptor = os.open(database, os.O_RDWR | OPEN_FLAGS)
        except FileNotFoundError:
            yield
            return
    try:
        start, length = _SQLITE_LOCKS
        with explained("lock", database):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            except (BlockingIOError, PermissionError):
                raise DatabaseBusyError(
                    f"another program has {quoted(database)} open through SQLite, such as its shell or a replicator: "
                    "stop it first"
                ) from None
        yield
    finally:
        with explained("close", database):
            os.close(descriptor)


def _holders(path: Path) -> str:
    """Name the processes that hold a lock, as Linux lists them (proc_locks(5))."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process or thread"
    fields = [line.split() for line in lines]
    numbers = {
        int(field[4])
        for field in fields
        if len(field) > 5 and field[1] == "FLOCK" and field[5].endswith(f":{inode}") and int(field[4]) > 0
    }
    if not numbers:
        return "another process or thread"
    if numbers == {os.getpid()}:
        return "this very process"
    return "process " + ", ".join(map(str, sorted(numbers)))
