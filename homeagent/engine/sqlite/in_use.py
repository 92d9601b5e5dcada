"""The in-use lock is a shared lock on the file `homeagent.db.open` that each process with an open database holds. A
restore takes the lock exclusively, and therefore does not replace an open database.
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

# SQLite's locks in a database file are one byte for PENDING, one byte for RESERVED, and the SHARED range
# (https://sqlite.org/src/file/src/os.h). An open connection in WAL mode holds a lock in the SHARED range.
_SQLITE_LOCKS = (0x40000000, 512)


def in_use_path(database: Path) -> Path:
    """Return the path of a database's in-use lock file."""
    return database.with_name(database.name + ".open")


def hold_in_use_lock(database: Path, *, timeout: timedelta, exclusive_if_free: bool = False) -> FileLock | None:
    """Finish an interrupted restore, and take the shared in-use lock. The caller holds the lock until the last
    connection is closed. In a read-only directory without the lock file, return None, because neither a restore nor
    SQLite can write.
    """
    path = in_use_path(database)
    while True:
        lock = FileLock(path, timeout=timeout, shared=True, exclusive_if_free=exclusive_if_free)
        try:
            lock.acquire()
        except ReadOnlyError:
            return None
        except DatabaseError as error:
            if isinstance(error.__cause__, PermissionError) and not os.access(database.parent, os.W_OK):
                return None
            raise
        if lock.read_marker() is None:
            return lock
        # The exclusive lock proves that no other process has the database open.
        lock.release()
        with FileLock(path, timeout=timeout) as exclusive:
            finish_replacement(exclusive, database, timeout=timeout)


@contextmanager
def alone(database: Path, *, timeout: timedelta) -> Iterator[FileLock]:
    """Hold the exclusive in-use lock, and first finish an interrupted restore. The database can be damaged."""
    lock = FileLock(in_use_path(database), timeout=timeout)
    try:
        lock.acquire()
    except DatabaseBusyError:
        raise DatabaseBusyError(
            f"{quoted(database)} is open in {_holders(lock.path)}: close the database there, then try again"
        ) from None
    try:
        finish_replacement(lock, database, timeout=timeout)
        yield lock
    finally:
        lock.release()


@contextmanager
def kept_from_sqlite(database: Path) -> Iterator[None]:
    """Keep programs that use SQLite from opening the file during the block. Do not call the function while SQLite has
    the file open in this process, because the close of any descriptor drops all locks of this process on the file.
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
                    "stop that program first"
                ) from None
        yield
    finally:
        with explained("close", database):
            os.close(descriptor)


def _holders(path: Path) -> str:
    """Return a text that names the processes with a lock on the file, from /proc/locks (proc_locks(5))."""
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
        return "this process"
    return "process " + ", ".join(map(str, sorted(numbers)))
