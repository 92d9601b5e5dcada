"""A database gives way to another one: a crash at any instant leaves the old one in place or the new one, whole.

Both a database and its log have to change, which no file system does in one step; and in between, SQLite would replay
the old log over the new file, or read the old file without its last commits. So what is to be done is written down
first, in the lock file that everybody passes who opens the database. Who finds it there finishes it before anything
else. From then on it is the new one, and until then it was the old one.
"""

from __future__ import annotations

import errno
import os
import re
from datetime import timedelta
from pathlib import Path

from homeagent.engine.files.database_file import judge_file, sidecars
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.sync import fsync_directory
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.engine import sidecar_lock
from homeagent.errors import CorruptDatabaseError

__all__ = [
    "epoch_of_marker",
    "finish_replacement",
    "marker_of_epoch",
    "new_path",
    "quarantine_path",
    "replace_database",
]

# The last word tells a whole text from one that the power cut short: nothing was moved before it was on the disk.
_INTENT = r"swap (\w+) (\d+) end"
_MARKER = r"initialised, epoch (\d+)"


def new_path(database: Path, stamp: str) -> Path:
    """Return where the new database is until it is swapped in."""
    return database.with_name(f"{database.name}.{stamp}.restoring")


def quarantine_path(database: Path, stamp: str) -> Path:
    """Return where the old one is kept afterwards, its log and the like beside it under the same name."""
    return database.with_name(f"{database.name}.{stamp}.quarantine")


def marker_of_epoch(epoch: int) -> str:
    """Return what the database's lock file says of one that was made here, or restored in this epoch."""
    return "initialised" if epoch == 1 else f"initialised, epoch {epoch}"


def epoch_of_marker(marker: str | None) -> int:
    """Return the epoch that a lock file tells of, however damaged the database is; 0 where none was made here."""
    if marker is None:
        return 0
    found = re.fullmatch(_MARKER, marker)
    return int(found[1]) if found else 1


def replace_database(lock: FileLock, database: Path, *, stamp: str, epoch: int, timeout: timedelta) -> None:
    """Put the file at `new_path` in the place of the database, and that, with what is beside it, at `quarantine_path`.

    Args:
        lock: the presence lock, held alone.
        database: the file; it may be absent.
        stamp: letters and digits, which tell this swap from others.
        epoch: the new one's, for the lock file's marker.
        timeout: how long to wait for the lock that initialisation takes.

    Raises:
        DatabaseError: it failed on the way. Whoever opens the database next finishes it.
    """
    lock.write_marker(f"swap {stamp} {epoch} end")
    finish_replacement(lock, database, timeout=timeout)


def finish_replacement(lock: FileLock, database: Path, *, timeout: timedelta) -> None:
    """Finish what a lock file says was begun; nothing where it says nothing.

    Args:
        lock: the presence lock, held alone.
        database: the file; it may be absent.
        timeout: how long to wait for the lock that initialisation takes.

    Raises:
        InsecureFileError, ForeignDatabaseError: another user put a file in the place of the new database.
        CorruptDatabaseError: the lock file says what this version does not understand.
        DatabaseError: it failed on the way; it can be tried again.
    """
    intent = lock.read_marker()
    if intent is None:
        return
    if not intent.endswith(" end"):
        lock.clear_marker()
        return
    found = re.fullmatch(_INTENT, intent)
    if found is None:
        raise CorruptDatabaseError(
            f"{quoted(lock.path)} tells of a restore that this version does not understand: "
            "finish it with the version that began it"
        )
    stamp, epoch = found[1], int(found[2])
    new, aside = new_path(database, stamp), quarantine_path(database, stamp)
    # Judged: the swap may have been finished before, and another user may have put a file of that name here since.
    if judge_file(new, is_database=False) is not None:
        with explained("put the restored database in place at", database):
            # The old one keeps its name until the new one takes it, so that there is one at every moment.
            if os.path.lexists(database) and not os.path.lexists(aside):
                _give_second_name(database, aside)
            for beside, kept in zip(sidecars(database), sidecars(aside), strict=True):
                if os.path.lexists(beside):
                    beside.replace(kept)
            fsync_directory(database.parent)
            new.replace(database)
        fsync_directory(database.parent)
    with sidecar_lock(database, timeout=timeout) as making:
        making.write_marker(marker_of_epoch(epoch))
    lock.clear_marker()


def _give_second_name(path: Path, second: Path) -> None:
    try:
        second.hardlink_to(path)
    except OSError as error:
        # Not every file system has hard links. Then there is none in place for a moment, and who opens the database
        # in that moment finishes the swap all the same.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        path.replace(second)
