"""The in-use lock is a lock on the file `homeagent.db.open`. Each process with an open database shares the lock. A
restore takes the lock exclusively. So a restore can't replace an open database.

A restore replaces the database atomically. No file system can replace a file and its WAL in one step. So homeagent
first writes a marker to the in-use lock file. After a crash, `Database.open()` finds the marker and finishes the
replacement.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from homeagent.engine.files.database_file import OPEN_FLAGS, inspect_file, sidecars
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.sync import fsync_directory
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.engine import sidecar_lock
from homeagent.errors import CorruptDatabaseError, DatabaseBusyError, DatabaseError, ReadOnlyError

# The bytes of SQLite's locks PENDING, RESERVED and SHARED (https://sqlite.org/src/file/src/os.h). In WAL mode, an open
# connection holds the lock SHARED.
_SQLITE_LOCKS = (0x40000000, 512)


def in_use_path(database: Path) -> Path:
    """Return the path of a database's in-use lock file."""
    return database.with_name(database.name + ".open")


def hold_in_use_lock(database: Path, *, timeout: timedelta, exclusive_if_free: bool = False) -> FileLock | None:
    """Finish an interrupted restore, and take the in-use lock (for `exclusive_if_free`, see `FileLock`). The caller
    must hold the lock until the last connection is closed. If the directory is read-only and has no lock file, return
    None. A restore can't write to a read-only directory.
    """
    path = in_use_path(database)
    while True:
        lock = FileLock(path, timeout=timeout, shared=True, exclusive_if_free=exclusive_if_free)
        try:
            lock.acquire()
        except DatabaseError as error:
            is_denied = isinstance(error.__cause__, PermissionError) and not os.access(database.parent, os.W_OK)
            if is_denied or isinstance(error, ReadOnlyError):
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
    """Hold the exclusive in-use lock during the block. Before the block, finish an interrupted restore. The database
    can be damaged.
    """
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
    """During the block, prevent programs from opening the file with SQLite. This process must not have the file open in
    SQLite. Closing the file would release SQLite's locks.
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
    """Describe the processes that lock the file, from /proc/locks (proc_locks(5))."""
    numbers: set[int] = set()
    with suppress(OSError):
        held = re.compile(rf"^\d+: FLOCK +\S+ +\S+ +([1-9]\d*) \S+:{path.stat().st_ino} ", re.M)
        numbers = set(map(int, held.findall(Path("/proc/locks").read_text())))
    if not numbers:
        return "another process or thread"
    if numbers == {os.getpid()}:
        return "this process"
    return "process " + ", ".join(map(str, sorted(numbers)))


# Replacement of a database

# A marker without "end" is incomplete, so homeagent has moved no file.
_INTENT = r"swap (\w+) (\d+) end"
_MARKER = r"initialised, epoch (\d+)"


def new_path(database: Path, stamp: str) -> Path:
    """Return the new database's path before the replacement."""
    return database.with_name(f"{database.name}.{stamp}.restoring")


def quarantine_path(database: Path, stamp: str) -> Path:
    """Return the old database's path after the replacement."""
    return database.with_name(f"{database.name}.{stamp}.quarantine")


def marker_of_epoch(epoch: int) -> str:
    """Return the lock file's marker for a database with this epoch."""
    return "initialised" if epoch == 1 else f"initialised, epoch {epoch}"


def epoch_of_marker(marker: str | None) -> int:
    """Return the epoch in a marker, or 0 for no marker."""
    if marker is None:
        return 0
    found = re.fullmatch(_MARKER, marker)
    return int(found[1]) if found else 1


def replace_database(lock: FileLock, database: Path, *, stamp: str, epoch: int, timeout: timedelta) -> None:
    """Replace the database by the file at `new_path`. Move the old files to `quarantine_path`. The caller must hold the
    in-use lock exclusively. If a step fails, the next `Database.open()` finishes the replacement.
    """
    lock.write_marker(f"swap {stamp} {epoch} end")
    finish_replacement(lock, database, timeout=timeout)


def finish_replacement(lock: FileLock, database: Path, *, timeout: timedelta) -> None:
    """Finish the replacement that the lock file's marker describes. A second call after an error tries again."""
    intent = lock.read_marker()
    if intent is None:
        return
    if not intent.endswith(" end"):
        lock.clear_marker()
        return
    found = re.fullmatch(_INTENT, intent)
    if found is None:
        raise CorruptDatabaseError(
            f"{quoted(lock.path)} describes a restore in a format that this version does not understand: "
            "finish the restore with the version that began it"
        )
    stamp, epoch = found[1], int(found[2])
    new, kept = new_path(database, stamp), quarantine_path(database, stamp)
    # Check the file at `new_path`, because another user could have created the file.
    if inspect_file(new, is_database=False) is not None:
        with explained("put the restored database in place at", database):
            # Between the first and the last rename, the database file is missing. A process that opens the database
            # then finishes the replacement.
            if os.path.lexists(database) and not os.path.lexists(kept):
                database.replace(kept)
            for old_sidecar, kept_sidecar in zip(sidecars(database), sidecars(kept), strict=True):
                if os.path.lexists(old_sidecar):
                    old_sidecar.replace(kept_sidecar)
            fsync_directory(database.parent)
            new.replace(database)
        fsync_directory(database.parent)
    with sidecar_lock(database, timeout=timeout) as initialisation:
        initialisation.write_marker(marker_of_epoch(epoch))
    lock.clear_marker()
