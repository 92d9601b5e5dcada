"""Locks between threads and processes, on files that SQLite does not open."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Self

from homeagent.clock import monotonic
from homeagent.engine.files.database_file import OPEN_FLAGS, create_descriptor, identity_of, inspect_file, look_at
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import DatabaseBusyError, DiskFullError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  # seconds until a waiting caller tries to lock the file again


class FileLock:
    """A lock by `flock()` between threads and processes. The holder can write a short text, the marker, for the next
    holder. With `exclusive_if_free=True`, `acquire()` tries an exclusive lock before a shared lock. With
    `writable=False`, the object can't change the mode or write a marker.
    """

    def __init__(
        self,
        path: Path,
        *,
        timeout: timedelta = timedelta(seconds=30),
        shared: bool = False,
        exclusive_if_free: bool = False,
        writable: bool = True,
    ) -> None:
        self.path = path
        self._operations = [fcntl.LOCK_EX] * (exclusive_if_free or not shared) + [fcntl.LOCK_SH] * shared
        self.is_exclusive: bool = not shared
        self._access = os.O_RDWR if writable else os.O_RDONLY
        self._seconds = timeout.total_seconds()
        self._descriptor = -1
        self._made = False

    @property
    def held(self) -> bool:
        """True if this object holds the lock."""
        return self._descriptor >= 0

    def acquire(self) -> None:
        """Acquire the lock. After the timeout, raise DatabaseBusyError."""
        deadline = monotonic() + self._seconds
        delay = _FIRST_PAUSE
        while not self._try():
            left = deadline - monotonic()
            if left <= 0:
                raise DatabaseBusyError(
                    f"another process or thread holds {quoted(self.path)}, waited {self._seconds:g} s for the lock: "
                    "try again later, or allow a longer timeout"
                )
            sleep(min(delay, left))
            delay = min(delay * 2, _LONGEST_PAUSE)

    def release(self) -> None:
        """Release the lock, if this object holds the lock. The lock is released even if the method raises an error."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return  # two threads can release the lock at the same time
        _held.discard(self)
        with explained("unlock", self.path):
            try:
                # Unlock the file first. A new child process can keep a copy of the descriptor open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def withdraw(self) -> None:
        """Release the lock. If this object created the lock file, remove the file. Keep a file that has a marker or
        another holder.
        """
        if self._made:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._descriptor).st_size == 0 and self._is_in_place(self._descriptor):
                    self.path.unlink()
        self.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def read_marker(self) -> str | None:
        """Return the marker of an earlier holder, or None. The caller must hold the lock."""
        with explained("read", self.path):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            content = os.read(self._descriptor, 4096)
        # Return only the first line. After a power cut, later lines can contain a part of the old marker.
        return content.split(b"\n", 1)[0].decode("utf-8", "replace") if content else None

    def write_marker(self, text: str) -> None:
        """Replace the marker by a line of text, and sync the file. The caller must hold an exclusive lock."""
        self._replace(text.encode() + b"\n")
        fsync_directory(self.path.parent)

    def clear_marker(self) -> None:
        """Remove the marker. The caller must hold an exclusive lock."""
        self._replace(b"")

    def _replace(self, content: bytes) -> None:
        """Replace the content of the lock file, and sync the file. The caller must hold an exclusive lock."""
        with explained("write", self.path):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            # Write before truncating, so that the file always contains a marker.
            written = os.write(self._descriptor, content)
            os.ftruncate(self._descriptor, written)
            sync(self._descriptor)
        if written != len(content):
            raise DiskFullError(f"the disk has no room to write {quoted(self.path)}: free some space")

    def _try(self) -> bool:
        """Try to lock the file. Each call opens the path, because another process can replace the file."""
        descriptor = self._open()
        if descriptor is None:
            return False
        locked = False
        with explained("lock", self.path):
            try:
                for operation in self._operations:
                    with suppress(BlockingIOError):
                        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                        self.is_exclusive = operation == fcntl.LOCK_EX
                        locked = self._is_in_place(descriptor)
                        break
            finally:
                if not locked:
                    os.close(descriptor)
        if locked:
            self._descriptor = descriptor
            _held.add(self)
        return locked

    def _open(self) -> int | None:
        """Return a descriptor of the lock file. If another process has just removed the file, return None."""
        with explained("open the lock file", self.path):
            descriptor = create_descriptor(self.path)
            if descriptor is not None:
                self._made = True
                return descriptor
            # While another process creates the file, the empty file can have a wrong mode. So set the mode of an empty
            # file.
            repair = self._access == os.O_RDWR
            if inspect_file(self.path, is_database=False, complete_empty=True, repair=repair) is None:
                return None
            try:
                return os.open(self.path, self._access | OPEN_FLAGS)
            except FileNotFoundError:
                return None

    def _is_in_place(self, descriptor: int) -> bool:
        """Return False if the locked file was removed or replaced. A lock on a removed file is useless."""
        status = look_at(self.path)
        return status is not None and identity_of(status) == identity_of(os.fstat(descriptor))


_held: set[FileLock] = set()


def _drop_inherited_locks() -> None:
    # A flock lock belongs to the open file. A child with an inherited descriptor would keep the lock.
    for lock in list(_held):
        descriptor, lock._descriptor = lock._descriptor, -1
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_inherited_locks)
