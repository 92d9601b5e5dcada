"""The database's files on disk: found, judged, made private, put in one another's place.

Who can write the database can let anybody in, and who can read it sees every device. So each file is 0600 and what
we can't vouch for is refused: a symlink, a second name for the same file, a file of another user (which users'
files are safe: `homeagent.engine.files.owners`).

An existing database is judged by `lstat` alone and never opened here. SQLite holds POSIX locks on it, and a process
loses all of them as soon as it closes any descriptor of that file (https://sqlite.org/howtocorrupt.html, section 2.2).
The same holds for the files beside it.

On Windows there are neither owners, modes nor `flock` to go by: what is not guarded there, `privacy.unguarded` says.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from homeagent.engine.files.owners import give_to_owner, refuse_replaceable, trusted_owners
from homeagent.engine.files.permissions import FILE_MODE, change_mode, modes_not_kept
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    ForeignDatabaseError,
    InsecureFileError,
    InvalidArgumentError,
)

__all__ = [
    "OPEN_FLAGS",
    "SMALLEST_DATABASE",
    "FileState",
    "atomic_replace",
    "create_descriptor",
    "create_file",
    "identity_of",
    "inspect_file",
    "judge_file",
    "locate_file",
    "look_at",
    "open_to_read",
    "refuse_insecure",
    "refuse_orphaned_log",
    "secure_sidecars",
    "sidecars",
]

logger = logging.getLogger("homeagent")

# The smallest page, so the smallest database (https://sqlite.org/fileformat2.html, section 1.3.2). SQLite itself
# takes a shorter file for an empty one, and would start anew where all revocations and nonces were.
SMALLEST_DATABASE = 512

_SIDECAR_SUFFIXES = ("-wal", "-shm", "-journal")

# Windows has only the last of these, and would else write a carriage return before each line feed.
OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# A file of SQLite's may come, go or be replaced by another process while it is judged. Nothing but a hostile or
# broken program keeps that up for this long.
_ATTEMPTS = 10


# Paths


def locate_file(path: str | os.PathLike[str]) -> Path:
    """Return where a database file really is: absolute, `~` expanded, links among its directories followed.

    The last component is left as it is, so that a link there is still seen and refused. A linked directory is
    legitimate: /tmp is one on macOS, and a home may lie on another volume. Nothing has to exist yet.

    Raises:
        InvalidArgumentError: the path is no path, is empty, holds a NUL, is not UTF-8, or names the home of an unknown
            user.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(f"a path must be a str or a PathLike, not {type(path).__name__}")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InvalidArgumentError("the path of a database is empty or holds a NUL: name a file")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidArgumentError(f"there is no home directory for {text!r}: write the path out") from error
    with explained("find", expanded):
        try:
            absolute = expanded.absolute()
            found = Path(os.path.realpath(absolute.parent)) / absolute.name
            # Manifests and reports name it, and JSON has no place for other bytes.
            str(found).encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"{text!r} is no UTF-8, or leads where none is: name another file") from None
    return found


def sidecars(path: Path) -> list[Path]:
    """Return the files that SQLite may keep beside this database, whether or not they exist.

    The write-ahead log, its shared-memory index and the rollback journal (https://sqlite.org/tempfiles.html).
    """
    return [path.with_name(path.name + suffix) for suffix in _SIDECAR_SUFFIXES]


# Files


class FileState(NamedTuple):
    """An existing file that was found to be regular, ours and private.

    Attributes:
        path: the file.
        size: in bytes; 0 is a database that was created and not yet initialised.
        mode: its permission bits, after any repair.
        uid: its owner; 0 on Windows.
        device, inode: together what the file is, whatever name it has.
        repaired_from: the permission bits it had before they were narrowed now; None where they were right.
    """

    path: Path
    size: int
    mode: int
    uid: int
    device: int
    inode: int
    repaired_from: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the file has no byte in it."""
        return self.size == 0


def inspect_file(path: Path) -> FileState | None:
    """Judge a database file without opening it, and make a looser mode of our own file 0600.

    A repair is told to the logger `homeagent`. A mode tighter than 0600 is kept, since someone wanted a file that
    can only be read; only an empty file gets 0600 in full, for a umask can have left it with less. A file that
    is refused is left as it is.

    Root may open a file of the directory's owner that is private to that user (see `homeagent.engine.files.owners`):
    SQLite then gives the files next to it to the same owner. A looser mode of such a file raises InsecureFileError: to
    change modes in a directory that another user controls is how root is made to change them elsewhere.

    Returns:
        None where there is no file.

    Raises:
        InsecureFileError: it is a link, has a second name (hard link), is another user's, or can't be made private; or
            the process runs as root, and other users can replace files in the directory.
        ForeignDatabaseError: it is a directory, a pipe, a socket or a device.
        CorruptDatabaseError: it has 1 to 511 bytes, too few for a database; SQLite would take it for an empty one.
        DatabaseError: it can't be looked at.
    """
    return judge_file(path, is_database=True)


def secure_sidecars(path: Path) -> list[FileState]:
    """Judge the files beside a database like the database itself, and return those that exist.

    SQLite gives them the database's mode, but only when it makes them: they may be older than the file.

    Raises:
        InsecureFileError, ForeignDatabaseError, DatabaseError: as in `inspect_file`.
    """
    states = [judge_file(sidecar, is_database=False) for sidecar in sidecars(path)]
    return [state for state in states if state is not None]


def refuse_orphaned_log(path: Path) -> None:
    """Refuse to begin anew where a write-ahead log shows that there was a database.

    A log is only made after the database's header is on the disk, so a log with content beside a missing or empty
    database means that the database was lost. SQLite would delete the log and start empty, and every revocation
    and every nonce would be forgotten. Call it under the lock that initialisation takes.

    Raises:
        CorruptDatabaseError: the log has content and the database has none.
    """
    log = sidecars(path)[0]
    # The log is looked at first: a database that is being made meanwhile gets its content before its log.
    if _size(log) and not _size(path):
        raise CorruptDatabaseError(
            f"{quoted(path)} is gone or empty, but its log {quoted(log)} is not: restore a backup, "
            "or move the log away to start with an empty database"
        )


def create_file(path: Path, *, database: Path | None = None) -> bool:
    """Create an empty database file that only its owner can read and write, under any umask.

    Its directory must exist. Other threads must not find the file before this returns, or SQLite may have locks on
    it that are lost when this closes it: create it under the lock that initialisation takes.

    Args:
        path: the file.
        database: of which it is to be a copy, as for `give_to_owner`.

    Returns:
        False where a file, or anything else of that name, exists already: nothing was changed.

    Raises:
        InsecureFileError: the file system does not keep modes.
        DatabaseError: it can't be made; `ReadOnlyError` and `DiskFullError` where that is why. No file is left.
    """
    with explained("create", path):
        descriptor = create_descriptor(path, database=database)
        if descriptor is None:
            return False
        try:
            os.close(descriptor)
            fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
    return True


def atomic_replace(source: Path, target: Path) -> None:
    """Put one file in another's place, so that after a power cut the name leads to the old or to the whole new one.

    Both lie in one file system, best in one directory. No connection of this process may have `source` open, and
    the files beside `target` are the caller's business: a stale log would be replayed over the new database.

    Raises:
        InsecureFileError, ForeignDatabaseError: `source` is a link, is not a regular file or can't be made private.
        DatabaseError: `source` is missing, or it can't be moved; `target` is then as it was.
    """
    if judge_file(source, is_database=False) is None:
        raise DatabaseError(f"there is no {quoted(source)} to put in the place of {quoted(target)}: make it first")
    with explained("sync", source):
        # Windows syncs only what is open for writing.
        descriptor = os.open(source, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | OPEN_FLAGS)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    with explained("replace", target):
        source.replace(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def create_descriptor(path: Path, *, database: Path | None = None) -> int | None:
    """Create an empty file with mode 0600 and return its descriptor, or None where the name is taken.

    A file that root creates belongs to the owner of its directory.

    Args:
        path: the file.
        database: of which it is to be a copy, as for `give_to_owner`.

    Raises:
        InsecureFileError: the file system does not keep modes.
        OSError: it can't be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, FILE_MODE)
    except FileExistsError:
        return None
    try:
        if sys.platform != "win32":
            # The umask took its bits from the mode above, and it can't be read without changing it for all threads.
            try:
                os.fchmod(descriptor, FILE_MODE)
            except PermissionError as error:
                raise modes_not_kept(path) from error
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
                raise modes_not_kept(path)
        give_to_owner(descriptor, path.parent, database=database)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(path: Path, owners: frozenset[int]) -> BinaryIO:
    """Open a file to read it, if it is a regular one with one name that belongs to one of these users.

    Not for a file that this process has open through SQLite: to close it would drop SQLite's locks.

    Args:
        path: the file.
        owners: as `trusted_owners` and `backup_owners` return them.

    Raises:
        InsecureFileError: it has a second name (hard link), or belongs to another user.
        ForeignDatabaseError: it is not a regular file.
        OSError: it can't be opened, or is a link.
    """
    # Judged by its descriptor: by its name it could be another file by now. A pipe must not make the caller wait.
    file = os.fdopen(os.open(path, os.O_RDONLY | OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        refuse_insecure(path, os.fstat(file.fileno()), owners)
    except BaseException:
        file.close()
        raise
    return file


def judge_file(path: Path, *, is_database: bool, complete_empty: bool = False, repair: bool = True) -> FileState | None:
    """Judge a file as `inspect_file` does, one that need not be a database either.

    Args:
        path: the file.
        is_database: whether one that is too short for a database is refused, and an empty one gets 0600 in full.
        complete_empty: whether any empty file gets 0600 in full.
        repair: False to leave the mode as it is, for a file that may be another application's.
    """
    repaired_from: int | None = None
    for _ in range(_ATTEMPTS):
        status = look_at(path)
        if status is None:
            return None
        refuse_replaceable(path.parent)
        _refuse(path, status, is_database=is_database)
        mode = stat.S_IMODE(status.st_mode)
        wanted = mode & FILE_MODE
        if (is_database or complete_empty) and status.st_size == 0:
            wanted = FILE_MODE
        if sys.platform == "win32" or mode == wanted or not repair:
            return FileState(
                path=path,
                size=status.st_size,
                mode=mode,
                uid=status.st_uid,
                device=status.st_dev,
                inode=status.st_ino,
                repaired_from=repaired_from,
            )
        with explained("make private", path):
            try:
                change_mode(path, wanted)
                changed = os.lstat(path)
            except FileNotFoundError:
                continue  # its owner process removed it: look again
        if identity_of(changed) != identity_of(status):
            continue  # replaced meanwhile: judge the new one
        if stat.S_IMODE(changed.st_mode) != wanted:
            raise modes_not_kept(path)
        logger.warning(
            "%s had mode %04o: made it %04o, since only its owner may use it",
            path,
            mode,
            wanted,
            extra={"event": "file_mode_repaired", "path": str(path), "mode_before": mode, "mode": wanted},
        )
        repaired_from = mode
    raise DatabaseError(f"{quoted(path)} keeps being replaced: find out which other program writes it")


def refuse_insecure(path: Path, status: os.stat_result, owners: frozenset[int]) -> None:
    """Refuse a file that is not a regular one with one name that belongs to one of these users.

    Args:
        path: the file.
        status: of the file.
        owners: as `trusted_owners` and `backup_owners` return them.

    Raises:
        InsecureFileError: it is a link, has a second name (hard link), or belongs to another user.
        ForeignDatabaseError: it is a directory, a pipe, a socket or a device.
    """
    if stat.S_ISLNK(status.st_mode):
        raise InsecureFileError(f"{quoted(path)} is a symbolic link: name the file itself, or remove the link")
    if stat.S_ISDIR(status.st_mode):
        raise ForeignDatabaseError(f"{quoted(path)} is a directory: name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ForeignDatabaseError(f"{quoted(path)} is a pipe, a socket or a device: name a regular file")
    if status.st_nlink > 1:
        raise InsecureFileError(
            f"{quoted(path)} has {status.st_nlink} names (hard links): remove the others, "
            f"or copy it and name the copy; 'find -inum {status.st_ino}' finds them"
        )
    if sys.platform == "win32" or status.st_uid in owners:
        return
    if os.geteuid() == 0:
        raise InsecureFileError(
            f"{quoted(path)} belongs to user {status.st_uid}, and only files of user "
            f"{' or '.join(map(str, sorted(owners)))} are safe here, since any other user may have put it there: "
            f"move it away; if you know that it is sound, copy it, or chown it to {max(owners)}"
        )
    raise _not_the_callers(path, status)


def _not_the_callers(path: Path, status: os.stat_result) -> InsecureFileError:
    return InsecureFileError(
        f"{quoted(path)} belongs to user {status.st_uid} and you are {os.geteuid()}: run as its owner, "
        "or let an administrator chown it to you and chmod it to 600"
    )


def _refuse(path: Path, status: os.stat_result, *, is_database: bool) -> None:
    refuse_insecure(path, status, trusted_owners(path.parent))
    if sys.platform != "win32" and status.st_uid != os.geteuid() and status.st_mode & 0o077:
        raise _not_the_callers(path, status)
    if is_database and 0 < status.st_size < SMALLEST_DATABASE:
        raise CorruptDatabaseError(
            f"{quoted(path)} has {status.st_size} bytes, too few for a database: restore a backup, or move it away"
        )


def look_at(path: Path) -> os.stat_result | None:
    """Return what `lstat` says of a path, None where there is nothing of that name."""
    with explained("look at", path):
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None


def _size(path: Path) -> int:
    status = look_at(path)
    return 0 if status is None else status.st_size


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Return what a file is, whatever name it has: its device and inode."""
    return status.st_dev, status.st_ino
