"""Why SQLite could not read or write: it keeps the system's error number to itself, so the system is asked once more.

Only where something failed already, so what this costs is no matter. The cause may be gone by the time it is asked
for: then SQLite's own code is all that is known.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import apsw

from homeagent.engine.driver_errors import sqlite_code, sqlite_code_name, sqlite_error
from homeagent.engine.files.database_file import sidecars
from homeagent.engine.files.system_errors import quoted
from homeagent.engine.sqlite.manifests import newest_backup
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseMovedError,
    DiskFullError,
    HomeAgentError,
    ReadOnlyError,
    TooManyFilesError,
)

__all__ = ["corrupt_after_all", "diagnosed_error", "newest_backup_hint"]

# What SQLite may have wanted to write in one piece: the index of the log grows by 32 KiB at a time.
_PIECE = 64 * 1024

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def diagnosed_error(
    error: BaseException, path: Path, *, find_moved: Callable[[], DatabaseMovedError | None]
) -> HomeAgentError:
    """Return ours for an exception of the SQLite driver, told apart by SQLite's code and by what the system says now.

    Args:
        error: the driver's exception.
        path: the database file.
        find_moved: tells whether the file is still the one that was opened.
    """
    fault = sqlite_error(error)
    if isinstance(fault, CorruptDatabaseError):
        moved = find_moved()
        if moved is not None:
            return moved
        return type(fault)(f"{fault}; it is {quoted(path)}, and {newest_backup_hint(path)}")
    code = sqlite_code(error)
    if code not in (apsw.SQLITE_CANTOPEN, apsw.SQLITE_IOERR, apsw.SQLITE_READONLY):
        return fault
    name = sqlite_code_name(error)
    if code != apsw.SQLITE_READONLY and _no_descriptor_left():
        return TooManyFilesError(
            "this process, or the machine, may open no more files: close some, or raise the limit "
            f"('ulimit -n'), then run the unit again [{name}]"
        )
    moved = find_moved()
    if moved is not None:
        return moved
    if code == apsw.SQLITE_READONLY:
        return fault
    if _at_size_limit(path):
        return DiskFullError(
            f"the files of {quoted(path)} may not grow beyond the limit of this process ('ulimit -f'): "
            f"raise it, then run the unit again [{name}]"
        )
    match _write_error(path.parent):
        case number if number in _NO_ROOM:
            return DiskFullError(f"there is no room left beside {quoted(path)}: make some, then try again [{name}]")
        case errno.EROFS:
            return ReadOnlyError(
                f"the file system of {quoted(path)} can only be read, which is what a disk that fails is turned to: "
                f"look into the system's log [{name}]"
            )
    return fault


def newest_backup_hint(path: Path) -> str:
    """Return what an error about a damaged database says of the backups that are known."""
    backup = newest_backup(path)
    return "no backup of it is known here" if backup is None else f"the newest backup is {quoted(backup)}"


def corrupt_after_all(path: Path) -> CorruptDatabaseError:
    """Return the error for a file that was a database of ours and has lost what is in it."""
    return CorruptDatabaseError(
        f"{path} held a database and is empty now: restore a backup, or remove {path.name}.lock to start anew "
        f"(every device, revocation and nonce is forgotten then); {newest_backup_hint(path)}"
    )


def _no_descriptor_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _at_size_limit(path: Path) -> bool:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    sizes = [0]
    for each in (path, *sidecars(path)):
        with suppress(OSError):
            sizes.append(each.lstat().st_size)
    return max(sizes) + _PIECE > limit


def _write_error(directory: Path) -> int | None:
    """Write a piece to a file without a name, and return the number of the error that this meets, None for none."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return _space_error(directory)
    try:
        descriptor = os.open(directory, flag | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            written = os.write(descriptor, bytes(_PIECE))
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems have no files without a name.
        return _space_error(directory) if error.errno in (errno.EOPNOTSUPP, errno.EISDIR) else error.errno
    return None if written == _PIECE else errno.ENOSPC


def _space_error(directory: Path) -> int | None:
    with suppress(OSError):
        state = os.statvfs(directory)
        if state.f_flag & os.ST_RDONLY:
            return errno.EROFS
        if state.f_bavail * state.f_frsize < _PIECE:
            return errno.ENOSPC
    return None
