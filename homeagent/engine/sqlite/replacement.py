"""Replace a database atomically. After a crash at any moment either the old or the new database is complete. No file
system can change the database file and its WAL in one step. homeagent therefore first writes a marker to the in-use
lock file, by which the next `Database.open()` finishes the replacement.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path

from homeagent.engine.files.database_file import inspect_file, sidecars
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.sync import fsync_directory
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.engine import sidecar_lock
from homeagent.errors import CorruptDatabaseError

# A marker without the word "end" shows that a power cut came before homeagent moved any file.
_INTENT = r"swap (\w+) (\d+) end"
_MARKER = r"initialised, epoch (\d+)"


def new_path(database: Path, stamp: str) -> Path:
    """Return the path that the new database has until the new database replaces the old database."""
    return database.with_name(f"{database.name}.{stamp}.restoring")


def quarantine_path(database: Path, stamp: str) -> Path:
    """Return the path to which the replacement moves the old database."""
    return database.with_name(f"{database.name}.{stamp}.quarantine")


def marker_of_epoch(epoch: int) -> str:
    """Return the lock file's marker for a database that was created, or restored, with this epoch."""
    return "initialised" if epoch == 1 else f"initialised, epoch {epoch}"


def epoch_of_marker(marker: str | None) -> int:
    """Return the epoch in a lock file's marker, or 0 if the file has no marker."""
    if marker is None:
        return 0
    found = re.fullmatch(_MARKER, marker)
    return int(found[1]) if found else 1


def replace_database(lock: FileLock, database: Path, *, stamp: str, epoch: int, timeout: timedelta) -> None:
    """Move the file at `new_path` to the database's path, and the old files to `quarantine_path`. The caller holds the
    in-use lock exclusively. If a step fails, the next process that opens the database finishes the replacement.
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
    # Check the file at `new_path`. After a finished replacement, another user can have created a file at `new_path`.
    if inspect_file(new, is_database=False) is not None:
        with explained("put the restored database in place at", database):
            # After the rename, no file has the database's path for a moment. If another process opens the database in
            # this moment, the process finds the marker and finishes the replacement.
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
