"""The database's files on disk: found, judged, made private, locked against other processes.

Who can write the database can let anybody in, and who can read it sees every device. So each file is 0600 and what
we can't vouch for is refused: a symlink, a second name for the same file, a file of another user.

An existing database is judged by `lstat` alone and never opened here. SQLite holds POSIX locks on it, and a process
loses all of them as soon as it closes any descriptor of that file (https://sqlite.org/howtocorrupt.html, section 2.2).
The same holds for the files beside it. Lock files are separate, and SQLite never sees them.

On Windows there are neither owners, modes nor `flock` to go by: what is not guarded there, `unguarded()` says.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseBusyError,
    DatabaseError,
    DiskFullError,
    ForeignDatabaseError,
    HomeAgentError,
    InsecureFileError,
    InvalidArgumentError,
    ReadOnlyError,
)

if sys.platform != "win32":
    import fcntl

__all__ = [
    "DirectoryReport",
    "FileLock",
    "FileState",
    "atomic_replace",
    "create_file",
    "filesystem_kind",
    "fsync_directory",
    "inspect_file",
    "is_network_filesystem",
    "locate_file",
    "prepare_directory",
    "refuse_network_filesystem",
    "refuse_orphaned_log",
    "secure_sidecars",
    "sidecars",
    "unguarded",
]

logger = logging.getLogger("homeagent")

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

# The smallest page, so the smallest database (https://sqlite.org/fileformat2.html, section 1.3.2). SQLite itself
# takes a shorter file for an empty one, and would start anew where all revocations and nonces were.
_SMALLEST_DATABASE = 512

_SIDECAR_SUFFIXES = ("-wal", "-shm", "-journal")

# Windows has only the last of these, and would else write a carriage return before each line feed.
_OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# A file of SQLite's may come, go or be replaced by another process while it is judged. Nothing but a hostile or
# broken program keeps that up for this long.
_ATTEMPTS = 10


def unguarded() -> str | None:
    """Return what this platform leaves unguarded, for the log and for `doctor`; None where all is guarded (POSIX)."""
    if sys.platform == "win32":
        return (
            "on Windows the owners and modes of the database's files are not checked, they are as private as their "
            "folder's access list; lock files do not hold other processes off; a rename is not synced to the disk"
        )
    return None


# Paths


def locate_file(path: str | os.PathLike[str]) -> Path:
    """Return where a database file really is: absolute, `~` expanded, links among its directories followed.

    The last component is left as it is, so that a link there is still seen and refused. A linked directory is
    legitimate: /tmp is one on macOS, and a home may lie on another volume. Nothing has to exist yet.

    Raises:
        InvalidArgumentError: the path is empty, holds a NUL or can't be encoded, or names the home of an unknown user.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InvalidArgumentError("the path of a database is empty or holds a NUL: name a file")
    try:
        os.fsencode(text)
        expanded = Path(text).expanduser()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{text!r} can't be a file name here: name another file") from error
    except RuntimeError as error:
        raise InvalidArgumentError(f"there is no home directory for {text!r}: write the path out") from error
    with _explained("find", expanded):
        absolute = expanded.absolute()
        return Path(os.path.realpath(absolute.parent)) / absolute.name


def sidecars(path: Path) -> list[Path]:
    """Return the files that SQLite may keep beside this database, whether or not they exist.

    The write-ahead log, its shared-memory index and the rollback journal (https://sqlite.org/tempfiles.html).
    """
    return [path.with_name(path.name + suffix) for suffix in _SIDECAR_SUFFIXES]


# Directories


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """A directory as it was found or made.

    Attributes:
        path: the directory.
        made: the directories that were made now, outermost first; empty where all existed.
        mode: its permission bits, sticky bit included.
        uid: its owner; 0 on Windows.
        listable: whether others may see the names in it, though not the files' content.
        problem: why its files are not safe from other users, with the remedy; None where they are.
    """

    path: Path
    made: tuple[Path, ...]
    mode: int
    uid: int
    listable: bool
    problem: str | None


_reported: set[Path] = set()
_reported_lock = threading.Lock()


def prepare_directory(directory: Path) -> DirectoryReport:
    """Make a directory for the database where it is missing, and report what others could do to one that exists.

    What is made is 0700 under any umask, missing parents included. What exists is left as it is, since somebody
    chose its mode and other programs may rely on it: the first time that it is found unsafe, the logger
    `homeagent` is warned.

    Raises:
        InvalidArgumentError: a component of the path is no directory.
        InsecureFileError: the file system does not keep modes.
        DatabaseError: it can't be made or looked into; `ReadOnlyError` and `DiskFullError` where that is why.
    """
    made: list[Path] = []
    for step in _missing_directories(directory):
        with _explained("make the directory", step):
            try:
                step.mkdir(DIRECTORY_MODE)
            except FileExistsError:
                continue  # another process was first, or a link leads nowhere: found out below
            if sys.platform != "win32" and not _is_private_directory(step):
                _change_mode(step, DIRECTORY_MODE)  # a umask may take bits from the owner too
                if not _is_private_directory(step):
                    raise _modes_not_kept(step)
        made.append(step)
        fsync_directory(step.parent)
    with _explained("look into the directory", directory):
        try:
            status = directory.stat()
        except FileNotFoundError:
            raise InvalidArgumentError(
                f"{_named(directory)} is a link that leads nowhere: remove it, or name another directory"
            ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidArgumentError(f"{_named(directory)} is a file: name a directory")
    report = DirectoryReport(
        path=directory,
        made=tuple(made),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        listable=sys.platform != "win32" and bool(status.st_mode & 0o044),
        problem=_directory_problem(directory, status),
    )
    problem = report.problem or unguarded()
    if problem is not None:
        with _reported_lock:
            is_news = directory not in _reported
            _reported.add(directory)
        if is_news:
            logger.warning("%s", problem)
    return report


def _missing_directories(directory: Path) -> list[Path]:
    """Return what has to be made, outermost first."""
    missing: list[Path] = []
    for candidate in (directory, *directory.parents):
        with _explained("look into the directory", candidate):
            try:
                status = candidate.stat()
            except FileNotFoundError:
                missing.append(candidate)
                continue
            except NotADirectoryError:
                continue  # a parent is a file: the walk gets to it, and names it
        if not stat.S_ISDIR(status.st_mode):
            raise InvalidArgumentError(f"{_named(candidate)} is a file, not a directory: name another path")
        break
    return missing[::-1]


def _is_private_directory(directory: Path) -> bool:
    return os.lstat(directory).st_mode & 0o777 == DIRECTORY_MODE  # a set-group-id bit may come from the parent


def _directory_problem(directory: Path, status: os.stat_result) -> str | None:
    if sys.platform == "win32":
        return None
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"the directory {_named(directory)} belongs to user {status.st_uid}, who can replace the database: "
            "keep it in a directory of your own"
        )
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        return (
            f"the directory {_named(directory)} has mode {stat.S_IMODE(status.st_mode):04o}, so others can replace "
            f"the database: chmod go-w {_named(directory)}"
        )
    return None


def fsync_directory(directory: Path) -> None:
    """Make what was created, renamed or removed in this directory survive a power cut (not on Windows).

    Raises:
        DatabaseError: the directory can't be opened or synced.
    """
    if sys.platform == "win32":
        return  # a directory can't be opened there
    with _explained("sync the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sync(descriptor)
        except OSError as error:
            # Some file systems have no such operation (fsync(2)); SQLite lets that pass as well.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


# Files


@dataclass(frozen=True, slots=True)
class FileState:
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

    The superuser may open another user's file that is private to that user: SQLite then gives the files beside it
    to the same owner. It is refused where the mode is looser, as another user's file always is: to change modes
    in a directory that somebody else controls is how a superuser is made to change them elsewhere.

    Returns:
        None where there is no file.

    Raises:
        InsecureFileError: it is a link, has a second name (hard link), is another user's, or can't be made private.
        ForeignDatabaseError: it is a directory, a pipe, a socket or a device.
        CorruptDatabaseError: it has 1 to 511 bytes, too few for a database; SQLite would take it for an empty one.
        DatabaseError: it can't be looked at.
    """
    return _judge(path, is_database=True)


def secure_sidecars(path: Path) -> list[FileState]:
    """Judge the files beside a database like the database itself, and return those that exist.

    SQLite gives them the database's mode, but only when it makes them: they may be older than the file.

    Raises:
        InsecureFileError, ForeignDatabaseError, DatabaseError: as in `inspect_file`.
    """
    states = [_judge(sidecar, is_database=False) for sidecar in sidecars(path)]
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
            f"{_named(path)} is gone or empty, but its log {_named(log)} is not: restore a backup, "
            "or move the log away to start with an empty database"
        )


def create_file(path: Path) -> bool:
    """Create an empty database file that only its owner can read and write, under any umask.

    Its directory must exist. Other threads must not find the file before this returns, or SQLite may have locks on
    it that are lost when this closes it: create it under the lock that initialisation takes.

    Returns:
        False where a file, or anything else of that name, exists already: nothing was changed.

    Raises:
        InsecureFileError: the file system does not keep modes.
        DatabaseError: it can't be made; `ReadOnlyError` and `DiskFullError` where that is why.
    """
    with _explained("create", path):
        descriptor = _create(path)
    if descriptor is None:
        return False
    os.close(descriptor)
    fsync_directory(path.parent)
    return True


def atomic_replace(source: Path, target: Path) -> None:
    """Put one file in another's place, so that after a power cut the name leads to the old or to the whole new one.

    Both lie in one file system, best in one directory. No connection of this process may have `source` open, and
    the files beside `target` are the caller's business: a stale log would be replayed over the new database.

    Raises:
        InsecureFileError, ForeignDatabaseError: `source` is a link, is not a regular file or can't be made private.
        DatabaseError: `source` is missing, or it can't be moved; `target` is then as it was.
    """
    if _judge(source, is_database=False) is None:
        raise DatabaseError(f"there is no {_named(source)} to put in the place of {_named(target)}: make it first")
    with _explained("sync", source):
        # Windows syncs only what is open for writing.
        descriptor = os.open(source, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _OPEN_FLAGS)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)
    with _explained("replace", target):
        source.replace(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def _create(path: Path) -> int | None:
    """Create an empty file with mode 0600 and return its descriptor, or None where the name is taken."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, FILE_MODE)
    except FileExistsError:
        return None
    try:
        if sys.platform != "win32":
            # The umask took its bits from the mode above, and it can't be read without changing it for all threads.
            try:
                os.fchmod(descriptor, FILE_MODE)
            except PermissionError as error:
                raise _modes_not_kept(path) from error
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
                raise _modes_not_kept(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _judge(path: Path, *, is_database: bool, complete_empty: bool = False) -> FileState | None:
    repaired_from: int | None = None
    for _ in range(_ATTEMPTS):
        status = _lstat(path)
        if status is None:
            return None
        _refuse(path, status, is_database=is_database)
        mode = stat.S_IMODE(status.st_mode)
        wanted = mode & FILE_MODE
        if (is_database or complete_empty) and status.st_size == 0:
            wanted = FILE_MODE
        if sys.platform == "win32" or mode == wanted:
            return FileState(
                path=path,
                size=status.st_size,
                mode=mode,
                uid=status.st_uid,
                device=status.st_dev,
                inode=status.st_ino,
                repaired_from=repaired_from,
            )
        with _explained("make private", path):
            try:
                _change_mode(path, wanted)
                changed = os.lstat(path)
            except FileNotFoundError:
                continue  # its owner process removed it: look again
        if _identity(changed) != _identity(status):
            continue  # replaced meanwhile: judge the new one
        if stat.S_IMODE(changed.st_mode) != wanted:
            raise _modes_not_kept(path)
        logger.warning("%s had mode %04o: made it %04o, since only its owner may use it", path, mode, wanted)
        repaired_from = mode
    raise DatabaseError(f"{_named(path)} keeps being replaced: find out which other program writes it")


def _refuse(path: Path, status: os.stat_result, *, is_database: bool) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise InsecureFileError(f"{_named(path)} is a symbolic link: name the file itself, or remove the link")
    if stat.S_ISDIR(status.st_mode):
        raise ForeignDatabaseError(f"{_named(path)} is a directory: name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ForeignDatabaseError(f"{_named(path)} is a pipe, a socket or a device: name a regular file")
    if status.st_nlink > 1:
        raise InsecureFileError(
            f"{_named(path)} has {status.st_nlink} names (hard links): remove the others, "
            f"or copy it and name the copy; 'find -inum {status.st_ino}' finds them"
        )
    if sys.platform != "win32":
        caller = os.geteuid()
        if status.st_uid != caller and (caller != 0 or status.st_mode & 0o077):
            raise InsecureFileError(
                f"{_named(path)} belongs to user {status.st_uid} and you are {caller}: run as its owner, "
                "or let an administrator chown it to you and chmod it to 600"
            )
    if is_database and 0 < status.st_size < _SMALLEST_DATABASE:
        raise CorruptDatabaseError(
            f"{_named(path)} has {status.st_size} bytes, too few for a database: restore a backup, or move it away"
        )


def _change_mode(path: Path, mode: int) -> None:
    try:
        path.chmod(mode, follow_symlinks=False)
    except NotImplementedError:
        # Raised for a link, and on a C library or container without the means to leave links alone.
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise InsecureFileError(f"{_named(path)} was replaced by a symbolic link: remove it") from None
        path.chmod(mode)
    except PermissionError as error:
        # The file is ours, or it was refused before.
        raise _modes_not_kept(path) from error


def _modes_not_kept(path: Path) -> InsecureFileError:
    return InsecureFileError(
        f"{_named(path)} can't be made private, its file system does not keep modes or does not let them change: "
        "keep the database on another one"
    )


def _lstat(path: Path) -> os.stat_result | None:
    with _explained("look at", path):
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None


def _size(path: Path) -> int:
    status = _lstat(path)
    return 0 if status is None else status.st_size


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        # There fsync leaves the data in the drive's cache (fsync(2) of macOS).
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
    os.fsync(descriptor)


# Locks between processes


class FileLock:
    """A lock that threads and processes hold on a file of its own, beside the database.

    The file is made 0600 where it is missing and never deleted: whoever waits on a deleted one would share the lock
    with whoever makes the next. The lock goes with the process, however that ends. A child made by `fork` does not
    have it. It keeps off only who asks for the same lock, and it can carry a short text for whoever holds it next.

    `flock` locks are used: unlike SQLite's POSIX locks they also part the threads of one process, and closing some
    other descriptor of the file does not drop them. On Windows no lock is taken, see `unguarded`.

    Args:
        path: the lock file; its directory must exist.
        timeout: how long `acquire` waits at most; zero tries once.
        shared: True admits other shared holders, and keeps off exclusive ones.
        monotonic, pause: the clock and the sleep to wait with, in seconds.
    """

    _FIRST_PAUSE = 0.001
    _LONGEST_PAUSE = 0.05  # what a waiter may lose at most once the lock is free

    def __init__(
        self,
        path: Path,
        *,
        timeout: timedelta = timedelta(seconds=30),
        shared: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        if timeout < timedelta(0):
            raise InvalidArgumentError("the timeout of a lock is negative: pass zero to try once")
        self.path = path
        self.shared = shared
        self._timeout = timeout
        self._monotonic = monotonic
        self._pause = pause
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, waiting for other holders no longer than the timeout.

        Raises:
            DatabaseBusyError: the timeout is over and others still hold it.
            InsecureFileError, ForeignDatabaseError: the lock file is not as `inspect_file` wants it.
            DatabaseError: this object holds it already, or the file can't be made, opened or locked.
        """
        if self._descriptor is not None:
            raise DatabaseError(f"this lock on {_named(self.path)} is held already: use one object per holder")
        seconds = self._timeout.total_seconds()
        deadline = self._monotonic() + seconds
        delay = self._FIRST_PAUSE
        while not self._try():
            left = deadline - self._monotonic()
            if left <= 0:
                raise DatabaseBusyError(
                    f"another process or thread holds {_named(self.path)}, waited {seconds:g} s for it: "
                    "try again when it is done, or allow a longer timeout"
                )
            self._pause(min(delay, left))
            delay = min(delay * 2, self._LONGEST_PAUSE)

    def release(self) -> None:
        """Give the lock back; one that is not held is left alone."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.discard(self)
        try:
            if sys.platform != "win32":
                # Closing alone would leave it locked while a child between fork and exec still has a copy.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def read_marker(self) -> str | None:
        """Return the text that a holder left in the lock file, None where none was left. Only while held.

        Raises:
            DatabaseError: the lock is not held, or the file can't be read.
        """
        descriptor = self._while_held()
        with _explained("read", self.path):
            content = _read(descriptor, 4096)
        if not content:
            return None
        # Whatever follows the first line is left over from a longer text that was overwritten when the power failed.
        return content.split(b"\n", 1)[0].decode("utf-8", "replace")

    def write_marker(self, text: str) -> None:
        """Leave a text in the lock file, in the place of the one before, synced to the disk. Only while held alone.

        Args:
            text: 1 to 200 bytes of UTF-8 without control characters.

        Raises:
            InvalidArgumentError: the text is none of that.
            DatabaseError: the lock is not held, or it is shared, or the file can't be written.
        """
        if not text.isprintable() or not 1 <= len(content := text.encode()) <= 200:
            raise InvalidArgumentError("a marker is 1 to 200 bytes of printable text: shorten it")
        descriptor = self._while_held()
        if self.shared:
            raise DatabaseError(f"the lock on {_named(self.path)} is shared: hold it alone to leave a marker")
        with _explained("write", self.path):
            os.lseek(descriptor, 0, os.SEEK_SET)
            # In one write, and cut to length after it, so that at no moment the file is without a marker.
            written = os.write(descriptor, content + b"\n")
            os.ftruncate(descriptor, written)
            _sync(descriptor)
        if written != len(content) + 1:
            raise DiskFullError(f"there was no room to write {_named(self.path)}: free some space")
        fsync_directory(self.path.parent)

    def _while_held(self) -> int:
        if self._descriptor is None:
            raise DatabaseError(f"the lock on {_named(self.path)} is not held: acquire it first")
        return self._descriptor

    def _try(self) -> bool:
        """Open the file and try to lock it; each try opens it anew, since the file may have been replaced."""
        descriptor = self._open()
        if descriptor is None:
            return False
        is_ours = False
        try:
            with _explained("lock", self.path):
                is_ours = self._lock(descriptor) and self._is_in_place(descriptor)
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            self._descriptor = descriptor
            _held.add(self)
        return is_ours

    def _open(self) -> int | None:
        """Return a descriptor of the lock file, or None where another process removed it at this very moment."""
        with _explained("open the lock file", self.path):
            descriptor = _create(self.path)
            if descriptor is not None:
                return descriptor
            # An empty one may still miss bits: its maker's umask took them, and gives them back a moment later.
            if _judge(self.path, is_database=False, complete_empty=True) is None:
                return None
            try:
                return os.open(self.path, os.O_RDWR | _OPEN_FLAGS)
            except FileNotFoundError:
                return None

    def _lock(self, descriptor: int) -> bool:
        if sys.platform != "win32":
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _is_in_place(self, descriptor: int) -> bool:
        """Tell whether the locked file still has its name: a lock on a removed one keeps nobody off."""
        status = _lstat(self.path)
        return status is not None and _identity(status) == _identity(os.fstat(descriptor))


_held: set[FileLock] = set()


def _drop_inherited_locks() -> None:
    # A lock belongs to the open file, which a forked child shares: it would outlive its holder in the child.
    for lock in list(_held):
        descriptor, lock._descriptor = lock._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_drop_inherited_locks)


def _read(descriptor: int, size: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, size)


# File systems

# Of more than one kernel: a server's, a host's beside its virtual machine's. WAL keeps its index in memory that all
# connections share, which such a file system does not give (https://sqlite.org/wal.html, section 1). 9p and virtiofs
# are refused although only one machine may use the file: reports of WAL databases corrupted within one guest exist
# for WSL 2's drives (9p), for gVisor's volumes (9p) and for Docker Desktop's and Podman's shared folders (virtiofs).
_NETWORK_KINDS = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fakeowner", "glusterfs", "gpfs", "lustre", "ncpfs",
        "nfs", "nfs4", "orangefs", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs",
        # through FUSE, as "fuse.<kind>"
        "ceph-fuse", "gcsfuse", "grpcfuse", "juicefs", "osxfs", "rclone", "s3fs", "sshfs", "vmhgfs-fuse",
    }
)  # fmt: skip


def filesystem_kind(path: Path, *, mount_table: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the kind of file system that a path lies on, such as "ext4" or "nfs4".

    Args:
        path: an existing path, or one that is yet to be made.
        mount_table: the kernel's list of mounts (proc_pid_mountinfo(5)).

    Returns:
        None where it can't be told: on macOS and Windows, and on a Linux without /proc.
    """
    if sys.platform == "win32":
        return None
    try:
        table = mount_table.read_bytes()
    except OSError:
        return None  # hidden or not there: unknown is an answer, and says nothing bad about the path
    with _explained("look at", path):
        place = Path(os.path.realpath(path))
        while not place.is_dir() and place != place.parent:
            place = place.parent
        status = place.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    found: tuple[bool, int, str] | None = None
    for line in table.splitlines():
        fields, separator, rest = line.partition(b" - ")
        if not separator:
            continue
        point = _unescaped(fields.split()[4])
        if place.is_relative_to(point):
            # The device decides, for a mount may hide longer ones below it. Btrfs shows another device in the table
            # than in stat(2): then the longest mount point does, and the later of two on the same one hides the other.
            rank = (fields.split()[2].decode() == device, len(point))
            if found is None or rank >= found[:2]:
                found = (*rank, rest.split()[0].decode("ascii", "replace"))
    return None if found is None else found[2]


def is_network_filesystem(kind: str) -> bool:
    """Tell whether a kind of file system is shared between machines, or between a host and its virtual machine.

    Args:
        kind: as `filesystem_kind` returns it; one mounted through FUSE begins with "fuse.".
    """
    return kind.removeprefix("fuse.") in _NETWORK_KINDS


def refuse_network_filesystem(path: Path, *, mount_table: Path = Path("/proc/self/mountinfo")) -> None:
    """Refuse a database on a file system that WAL does not work on (https://sqlite.org/wal.html, section 1).

    Where the kind can't be told nothing is refused, so on macOS the choice of the place stays with the operator.

    Raises:
        DatabaseError: the path lies on a network file system or a shared folder.
    """
    kind = filesystem_kind(path, mount_table=mount_table)
    if kind is not None and is_network_filesystem(kind):
        raise DatabaseError(
            f"{_named(path)} is on a network file system or shared folder ({kind}), where SQLite's write-ahead log "
            "can corrupt the database (https://sqlite.org/wal.html): keep it on a local disk, in a container on a "
            "named volume, or use PostgreSQL"
        )


def _unescaped(field: bytes) -> str:
    """Return a path of the mount table, where blanks and backslashes are written in octal."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field))


# Errors


@contextmanager
def _explained(act: str, path: Path) -> Iterator[None]:
    """Turn the operating system's error into one of ours, which names the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise _explain(error, act, path) from error


def _explain(error: OSError, act: str, path: Path) -> HomeAgentError:
    name = _named(path)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFullError(f"there is no room to {act} {name}: free some space")
        case errno.EROFS:
            return ReadOnlyError(f"can't {act} {name} on a read-only file system: name a path that can be written")
        case errno.EACCES | errno.EPERM:
            return DatabaseError(
                f"no permission to {act} {name}: run as the owner of it and of its directory, or name another path"
            )
        case errno.ENOENT:
            return DatabaseError(
                f"can't {act} {name}: its directory is missing or is a link that leads nowhere, make it first"
            )
        case errno.ELOOP:
            return InsecureFileError(
                f"can't {act} {name}, a symbolic link is in its place or links lead in a circle: name the file itself"
            )
        case errno.ENOTDIR | errno.ENAMETOOLONG:
            return InvalidArgumentError(
                f"can't {act} {name}, it is too long or leads through a file: name another path"
            )
        case errno.EXDEV:
            return DatabaseError(f"can't {act} {name} from another file system: put the new file beside it")
        case _:
            reason = os.strerror(error.errno) if error.errno is not None else type(error).__name__
            return DatabaseError(f"can't {act} {name} ({reason}): mend that, or name another path")


def _named(path: Path) -> str:
    # Quoted, for a file name may hold a line break or worse.
    return repr(str(path))
