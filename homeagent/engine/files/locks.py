"""Locks between threads and processes, on files of their own that SQLite never sees."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from homeagent.engine.files.database_file import OPEN_FLAGS, create_descriptor, identity_of, judge_file, look_at
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import DatabaseBusyError, DatabaseError, DiskFullError, InvalidArgumentError

if sys.platform != "win32":
    import fcntl

__all__ = ["FileLock"]


class FileLock:
    """A lock that threads and processes hold on a file of its own, beside the database.

    The file is made 0600 where it is missing and never deleted: whoever waits on a deleted one would share the lock
    with whoever makes the next. The lock goes with the process, however that ends. A child made by `fork` does not
    have it. It keeps off only who asks for the same lock, and it can carry a short text for whoever holds it next.

    `flock` locks are used: unlike SQLite's POSIX locks they also part the threads of one process, and closing some
    other descriptor of the file does not drop them. On Windows no lock is taken, see `privacy.unguarded`.

    Args:
        path: the lock file; its directory must exist.
        timeout: how long `acquire` waits at most; zero tries once.
        shared: True admits other shared holders, and keeps off exclusive ones.
        writable: False for a file that may lie where nothing can be written, or be another application's: its mode
            stays as it is, and no marker is written.
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
        writable: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        if timeout < timedelta(0):
            raise InvalidArgumentError("the timeout of a lock is negative: pass zero to try once")
        self.path = path
        self.shared = shared
        self._access = os.O_RDWR if writable else os.O_RDONLY
        self._timeout = timeout
        self._monotonic = monotonic
        self._pause = pause
        self._descriptor: int | None = None
        self._made = False

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
            raise DatabaseError(f"this lock on {quoted(self.path)} is held already: use one object per holder")
        seconds = self._timeout.total_seconds()
        deadline = self._monotonic() + seconds
        delay = self._FIRST_PAUSE
        while not self._try():
            left = deadline - self._monotonic()
            if left <= 0:
                raise DatabaseBusyError(
                    f"another process or thread holds {quoted(self.path)}, waited {seconds:g} s for it: "
                    "try again when it is done, or allow a longer timeout"
                )
            self._pause(min(delay, left))
            delay = min(delay * 2, self._LONGEST_PAUSE)

    def release(self) -> None:
        """Give the lock back; one that is not held is left alone.

        Raises:
            DatabaseError: the system could not unlock the file. This object does not hold the lock any more.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.discard(self)
        with explained("unlock", self.path):
            try:
                if sys.platform != "win32":
                    # Closing alone would leave it locked while a child between fork and exec still has a copy.
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def withdraw(self) -> None:
        """Give the lock back, and take its file away again where this made it, no other holds it and it is empty.

        Whoever waits for a lock looks whether its file still has its name, and begins anew where it has not.
        """
        descriptor = self._while_held()
        if self._made and sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_size == 0 and self._is_in_place(descriptor):
                    self.path.unlink()
        self.release()

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
        with explained("read", self.path):
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
            raise DatabaseError(f"the lock on {quoted(self.path)} is shared: hold it alone to leave a marker")
        with explained("write", self.path):
            os.lseek(descriptor, 0, os.SEEK_SET)
            # In one write, and cut to length after it, so that at no moment the file is without a marker.
            written = os.write(descriptor, content + b"\n")
            os.ftruncate(descriptor, written)
            sync(descriptor)
        if written != len(content) + 1:
            raise DiskFullError(f"there was no room to write {quoted(self.path)}: free some space")
        fsync_directory(self.path.parent)

    def clear_marker(self) -> None:
        """Take the text out of the lock file again, synced to the disk. Only while held alone.

        Raises:
            DatabaseError: the lock is not held, or it is shared, or the file can't be written.
        """
        descriptor = self._while_held()
        if self.shared:
            raise DatabaseError(f"the lock on {quoted(self.path)} is shared: hold it alone to take a marker away")
        with explained("write", self.path):
            os.ftruncate(descriptor, 0)
            sync(descriptor)

    def has_marker(self) -> bool:
        """Tell whether a holder left a text in the lock file. Only while held.

        Raises:
            DatabaseError: the lock is not held.
        """
        descriptor = self._while_held()
        with explained("look at", self.path):
            return os.fstat(descriptor).st_size > 0

    def _while_held(self) -> int:
        if self._descriptor is None:
            raise DatabaseError(f"the lock on {quoted(self.path)} is not held: acquire it first")
        return self._descriptor

    def _try(self) -> bool:
        """Open the file and try to lock it; each try opens it anew, since the file may have been replaced."""
        descriptor = self._open()
        if descriptor is None:
            return False
        is_homeagent_database = False
        with explained("lock", self.path):
            try:
                is_homeagent_database = self._lock(descriptor) and self._is_in_place(descriptor)
            finally:
                if not is_homeagent_database:
                    os.close(descriptor)
        if is_homeagent_database:
            self._descriptor = descriptor
            _held.add(self)
        return is_homeagent_database

    def _open(self) -> int | None:
        """Return a descriptor of the lock file, or None where another process removed it at this very moment."""
        with explained("open the lock file", self.path):
            descriptor = create_descriptor(self.path)
            if descriptor is not None:
                self._made = True
                return descriptor
            # An empty one may still miss bits: its maker's umask took them, and gives them back a moment later.
            repair = self._access == os.O_RDWR
            if judge_file(self.path, is_database=False, complete_empty=True, repair=repair) is None:
                return None
            try:
                return os.open(self.path, self._access | OPEN_FLAGS)
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
        status = look_at(self.path)
        return status is not None and identity_of(status) == identity_of(os.fstat(descriptor))


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
