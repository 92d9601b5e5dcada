"""Locate, inspect and create the files of a SQLite database. Do not open a file that SQLite has open in this process.
Closing any descriptor of the file would release SQLite's locks (https://sqlite.org/howtocorrupt.html, section 2.2).
"""

from __future__ import annotations

import logging
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from homeagent.engine.files.owners import give_to_owner, refuse_replaceable, trusted_owners
from homeagent.engine.files.sync import fsync_directory
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    ForeignDatabaseError,
    InsecureFileError,
    InvalidArgumentError,
)

logger: logging.Logger = logging.getLogger("homeagent")

# The smallest database has one page of the smallest size (https://sqlite.org/fileformat2.html, section 1.3.2). SQLite
# treats a file below 512 bytes as an empty database. All revocations and nonces would be lost.
SMALLEST_DATABASE = 512

FILE_MODE = 0o600

CONTROL_CHARACTER = re.compile(r"[\0-\x1f\x7f-\x9f]")

_SIDECAR_SUFFIXES = ("-wal", "-shm", "-journal")

OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def locate_file(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file, which can be missing. Resolve only links to directories. The function
    `inspect_file()` refuses a link in the path's last component.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(f"a path must be a str or a PathLike, not {type(path).__name__}")
    text = os.fspath(path)
    if not text:
        raise InvalidArgumentError("the path of a database is empty: name a file")
    if CONTROL_CHARACTER.search(text):
        # A path from a text file can end with a line break. SQLite would include the line break in the file's name.
        raise InvalidArgumentError("the path holds a control character, such as a line break: remove the character")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidArgumentError(f"there is no home directory for {text!r}: write the path out") from error
    with explained("find", expanded):
        try:
            absolute = expanded.absolute()
            found = Path(os.path.realpath(absolute.parent)) / absolute.name
            # Manifests and reports contain the path as JSON text in UTF-8.
            str(found).encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"the path {text!r} or its directory is not UTF-8: name another file") from None
    return found


def sidecars(path: Path) -> list[Path]:
    """Return the paths of the WAL, WAL index and rollback journal (https://sqlite.org/tempfiles.html)."""
    return [path.with_name(path.name + suffix) for suffix in _SIDECAR_SUFFIXES]


def secure_sidecars(path: Path) -> list[Path]:
    """Inspect and return the existing sidecar files. SQLite does not correct the mode of an existing file."""
    return [sidecar for sidecar in sidecars(path) if inspect_file(sidecar, is_database=False) is not None]


def refuse_orphaned_log(path: Path) -> None:
    """If the database is missing or empty, refuse a WAL that has content. SQLite itself would delete the WAL. A caller
    that creates a database must hold `sidecar_lock`.
    """
    log = sidecars(path)[0]
    # Read the size of the WAL first. Another process can create both files between the two reads.
    if size_of(log) and not size_of(path):
        raise CorruptDatabaseError(
            f"{quoted(path)} is gone or empty, but its log {quoted(log)} is not: restore a backup, "
            "or move the log away to start with an empty database"
        )


def create_file(path: Path, *, database: Path | None = None) -> bool:
    """Create an empty database file with mode 0600. Return False if the file exists. The caller must hold
    `sidecar_lock`. Otherwise another thread could open the file before the close.
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


def create_descriptor(path: Path, *, database: Path | None = None) -> int | None:
    """Create an empty file with mode 0600, and return its descriptor. If the path exists, return None. For a copy in
    another directory, pass the database's path (see `give_to_owner`).
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, FILE_MODE)
    except FileExistsError:
        return None
    try:
        # Set the mode again, because the umask removes bits from a mode. Do not read the umask. The system call would
        # change the umask of all threads.
        with suppress(PermissionError):
            os.fchmod(descriptor, FILE_MODE)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
            path.unlink()  # no other process uses the file, because homeagent refuses the mode
            raise modes_not_kept(path)
        give_to_owner(descriptor, path.parent, database=database)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(path: Path, owners: frozenset[int]) -> BinaryIO:
    """Open a regular file of a trusted user for reading. Do not pass a file that SQLite has open in this process.
    Closing the returned file would release SQLite's locks.
    """
    # Check the opened file, not the path. Another process can replace the file at the path. Without O_NONBLOCK, opening
    # a pipe would wait for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | OPEN_FLAGS | os.O_NONBLOCK), "rb")
    try:
        refuse_insecure(path, os.fstat(file.fileno()), owners)
    except BaseException:
        file.close()
        raise
    return file


def inspect_file(
    path: Path, *, is_database: bool = True, complete_empty: bool = False, repair: bool = True
) -> os.stat_result | None:
    """Refuse an unsafe file, without opening the file. Narrow the mode of the caller's own file to 0600.

    With `is_database=True`, refuse a file that is too short for a database. With `is_database=True` or
    `complete_empty=True`, set an empty file's mode to 0600. With `repair=False`, do not change the mode. Return the
    result of `lstat`, or None for a missing file.
    """
    status = look_at(path)
    if status is None:
        return None
    refuse_replaceable(path.parent)
    refuse_insecure(path, status, trusted_owners(path.parent))
    # As root, do not change the mode of another user's file. The user could make root change the mode of a different
    # file.
    if status.st_uid != os.geteuid() and status.st_mode & 0o077:
        raise _not_the_callers(path, status)
    if is_database and 0 < status.st_size < SMALLEST_DATABASE:
        raise CorruptDatabaseError(
            f"{quoted(path)} has {status.st_size} bytes, too few for a database: restore a backup, or move it away"
        )
    mode = stat.S_IMODE(status.st_mode)
    wanted = mode & FILE_MODE
    if (is_database or complete_empty) and status.st_size == 0:
        wanted = FILE_MODE
    if mode == wanted or not repair:
        return status
    with explained("make private", path):
        try:
            change_mode(path, wanted)
            changed = os.lstat(path)
        except FileNotFoundError:
            return None  # another process has removed the file
    if identity_of(changed) != identity_of(status):
        raise DatabaseError(f"another program replaced {quoted(path)} during the inspection: stop that program")
    if stat.S_IMODE(changed.st_mode) != wanted:
        raise modes_not_kept(path)
    logger.warning(
        "%s had mode %04o: changed to %04o, because only the owner may use the file",
        path,
        mode,
        wanted,
        extra={"event": "file_mode_repaired", "path": str(path), "mode_before": mode, "mode": wanted},
    )
    return changed


def refuse_insecure(path: Path, status: os.stat_result, owners: frozenset[int]) -> None:
    """Accept only a regular file that a given user owns. The file must have exactly one hard link. Otherwise raise an
    error.
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
    if status.st_uid in owners:
        return
    if os.geteuid() == 0:
        raise InsecureFileError(
            f"{quoted(path)} belongs to user {status.st_uid}, and only files of user "
            f"{' or '.join(map(str, sorted(owners)))} are trusted here: move the file away, "
            f"or, if you know that the file is sound, chown it to {max(owners)}"
        )
    raise _not_the_callers(path, status)


def _not_the_callers(path: Path, status: os.stat_result) -> InsecureFileError:
    """Return the error for a file of another user. The error names both user ids."""
    return InsecureFileError(
        f"{quoted(path)} belongs to user {status.st_uid} and you are {os.geteuid()}: run as its owner, "
        "or let an administrator chown it to you and chmod it to 600"
    )


def change_mode(path: Path, mode: int) -> None:
    """Change the mode of the caller's own file or directory. For a link or a refused mode, raise InsecureFileError."""
    try:
        path.chmod(mode, follow_symlinks=False)
    except NotImplementedError:
        # Python raises NotImplementedError for a link. On some systems, Python raises the error for every file.
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise InsecureFileError(f"{quoted(path)} was replaced by a symbolic link: remove it") from None
        path.chmod(mode)
    except PermissionError as error:
        # The caller owns the file, so the file system refused the mode.
        raise modes_not_kept(path) from error


def modes_not_kept(path: Path) -> InsecureFileError:
    """Return the error for a file system that does not keep modes."""
    return InsecureFileError(
        f"{quoted(path)} can't be made private, its file system does not keep modes or does not let them change: "
        "move the database to another file system"
    )


def look_at(path: Path) -> os.stat_result | None:
    """Return the result of `os.lstat()`. If the path does not exist, return None."""
    with explained("inspect", path):
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None


def size_of(path: Path) -> int:
    """Return the size of a file in bytes. If the path does not exist, return 0."""
    status = look_at(path)
    return 0 if status is None else status.st_size


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Return the device and inode of a file. A rename keeps both values."""
    return status.st_dev, status.st_ino
