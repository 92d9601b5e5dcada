"""Find out why SQLite could not read or write. SQLite does not return the system's error number. A probe therefore
repeats the system call.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

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

# SQLite extends the WAL index by 32 KiB at a time. On an almost full disk, a smaller probe could still succeed.
_PIECE = 64 * 1024

# A backup opens two databases, and SQLite opens up to four files for each database. After the error, SQLite has closed
# the files again, so a probe for a single descriptor could succeed.
_DESCRIPTORS = 8


def diagnosed_error(
    error: BaseException, path: Path, *, find_moved: Callable[[], DatabaseMovedError | None]
) -> HomeAgentError:
    """Return homeagent's error for an exception of apsw. If the file was not moved or replaced, `find_moved()` returns
    None.
    """
    translation = sqlite_error(error)
    is_corrupt = isinstance(translation, CorruptDatabaseError)
    code, name = sqlite_code(error), sqlite_code_name(error)
    if not is_corrupt and code not in (apsw.SQLITE_CANTOPEN, apsw.SQLITE_IOERR, apsw.SQLITE_READONLY):
        return translation
    if not is_corrupt and code != apsw.SQLITE_READONLY and _lacks_descriptors():
        return TooManyFilesError(
            "this process or the system has reached its limit of open files: close some files, or raise the limit "
            f"('ulimit -n'), then run the unit again [{name}]"
        )
    moved = find_moved()
    if moved is not None:
        return moved
    if is_corrupt:
        return type(translation)(f"{translation}; the file is {quoted(path)}, and {newest_backup_hint(path)}")
    if code == apsw.SQLITE_READONLY:
        return translation
    if _at_size_limit(path):
        return DiskFullError(
            f"a file of {quoted(path)} has reached this process's limit of the file size ('ulimit -f'): "
            f"raise the limit, then run the unit again [{name}]"
        )
    match _write_error(path.parent):
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFullError(f"the disk of {quoted(path)} is full: free some space, then try again [{name}]")
        case errno.EROFS:
            return ReadOnlyError(
                f"the file system of {quoted(path)} is read-only. Linux remounts the file system of a failing disk "
                f"read-only: read the system's log [{name}]"
            )
    return translation


def newest_backup_hint(path: Path) -> str:
    """Return a clause about the newest backup, for an error message."""
    backup = newest_backup(path)
    return "no backup of the database is known here" if backup is None else f"the newest backup is {quoted(backup)}"


@contextmanager
def naming_newest_backup(path: Path) -> Iterator[None]:
    """Add a clause about the newest backup to a CorruptDatabaseError of the block, if the message lacks the clause."""
    try:
        yield
    except CorruptDatabaseError as error:
        hint = newest_backup_hint(path)
        if hint not in str(error):
            error.args = (f"{error}; {hint}",)
        raise


def corrupt_after_all(path: Path) -> CorruptDatabaseError:
    """Return the error for a database whose file was emptied or deleted."""
    return CorruptDatabaseError(
        f"{path} held a database and is empty or missing now: restore a backup, or remove {path.name}.lock for a new "
        f"database (every device, revocation and nonce is lost then); {newest_backup_hint(path)}"
    )


def _lacks_descriptors() -> bool:
    with ExitStack() as opened:
        try:
            for _ in range(_DESCRIPTORS):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
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
    """Write to a temporary file, and return the error number. If the write succeeds, return None."""
    try:
        with TemporaryFile(dir=directory, buffering=0) as file:
            written = file.write(bytes(_PIECE))
    except OSError as error:
        return error.errno
    return None if written == _PIECE else errno.ENOSPC
