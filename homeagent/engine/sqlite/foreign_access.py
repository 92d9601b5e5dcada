"""Protect an open database from a second SQLite library in this process. If another library closes the file, the
process loses SQLite's POSIX locks. Another process can then delete the WAL (https://sqlite.org/howtocorrupt.html,
section 2.2).
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import apsw

from homeagent.engine.files.database_file import OPEN_FLAGS, identity_of, look_at, sidecars
from homeagent.engine.files.file_identity import FileIdentityCheck
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.dialect import Connection, open_existing
from homeagent.errors import ForeignAccessError

Identity = tuple[int, int]

# Byte ranges that a guard locks. SQLite's os_unix.c names the values SHARED_FIRST, SHARED_SIZE and UNIX_SHM_DMS.
_SHARED_RANGE = (0x40000002, 510)
_WAL_INDEX_BYTE = (128, 1)

_DESCRIPTORS = Path("/proc/self/fd")

# Check the platform, because `_lock()` uses Linux's layout of struct flock.
_HAS_OFD_LOCKS = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")


class FileGuard:
    """Holds locks on one database file while this process has a connection. On Linux, closing another descriptor does
    not release the guard's locks. The locks show another SQLite library that the database is open.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._path = Path()
        self._mutex = threading.RLock()
        self._descriptors: list[int] = []
        self._holds = False
        self.connections: int = 0
        """Number of homeagent's connections to the file."""

    def opening(self, path: Path, *, refuse: bool) -> None:
        """Count a connection before it is opened. With `refuse=True`, raise ForeignAccessError if other code of this
        process has the file open.
        """
        with self._mutex:
            if not self.connections:
                if refuse:
                    self._refuse_foreign_descriptors(path)
                self._path = path  # a new file can have the inode of a deleted file
            self.connections += 1

    def _refuse_foreign_descriptors(self, path: Path) -> None:
        if not _DESCRIPTORS.is_dir():
            return
        with explained("look into", _DESCRIPTORS), os.scandir(_DESCRIPTORS) as links:
            for link in links:
                with suppress(OSError):  # The descriptor was closed after the listing.
                    # Read the number again. A signal handler can have opened the file.
                    if identity_of(link.stat()) == self._identity and not self.connections:
                        raise ForeignAccessError(
                            f"this process has {quoted(path)} open already, as descriptor {link.name}, but not through "
                            "homeagent: close the descriptor before Database.open, since a later close would drop "
                            "SQLite's locks"
                        )

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Count a connection as closed, and run the block that closes the connection. To close the last connection,
        SQLite needs an exclusive lock. So first release the guard's locks. Close the guard's descriptors only after the
        connection. Otherwise the connection would lose SQLite's locks.
        """
        with self._mutex, explained("unlock", self._path):
            self.connections -= 1
            failure = None if self.connections else self._release()
            try:
                yield
            except apsw.BusyError:
                self.connections += 1  # the file stays open, because another cursor has an unfinished statement
                raise
            finally:
                if not self.connections:
                    self.forget()
            if failure is not None:
                raise failure

    def hold(self) -> None:
        """If a connection is open, take the read locks. Call the method after a read. SQLite creates the WAL index at
        the first read.
        """
        with self._mutex:
            if self._holds or not self.connections:
                return
            if _HAS_OFD_LOCKS:
                spans = ((self._path, _SHARED_RANGE), (sidecars(self._path)[1], _WAL_INDEX_BYTE))
                for number, (path, span) in enumerate(spans):
                    if look_at(path) is None:
                        return  # a read-only file, for which SQLite creates no WAL index
                    with explained("lock", path):
                        # Keep the descriptor after an error. Closing the descriptor would drop SQLite's locks.
                        if number == len(self._descriptors):
                            self._descriptors.append(os.open(path, os.O_RDONLY | OPEN_FLAGS))
                        _lock(self._descriptors[number], fcntl.F_RDLCK, *span)
            self._holds = True

    def _release(self) -> OSError | None:
        """Release the locks. Return the last error, which the caller must raise after closing the connection."""
        failure = None
        for descriptor in self._descriptors:
            try:
                _lock(descriptor, fcntl.F_UNLCK, 0, 0)
            except OSError as error:
                failure = error
        self._holds = False
        return failure

    def forget(self) -> None:
        """Close the descriptors. While a connection is open, call the method only in a forked child."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _lock(descriptor: int, kind: int, start: int, length: int) -> None:
    """Take or release an OFD lock (Linux only) on a byte range. If the range has a conflicting lock, raise OSError."""
    # struct flock with l_pid 0: https://man7.org/linux/man-pages/man2/F_OFD_SETLK.2const.html
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0))


_is_hook_installed = False
_mutex = threading.RLock()
_guards: dict[Identity, FileGuard] = {}
"""Guards of all files that this process has opened. A guard stays after the last connection."""
_protected: weakref.WeakSet[FileIdentityCheck] = weakref.WeakSet()
"""Open databases. Before the first unit, a database can have no connection."""


def guard_of(identity: Identity) -> FileGuard:
    """Return the guard of a file. All `Database` objects of the file in this process share the guard."""
    with _mutex:
        guard = _guards.setdefault(identity, FileGuard(identity))
    return guard


def open_guarded(path: Path, options: str, *, timeout: float, refuse: bool = False) -> Connection:
    """Open an existing database (see `open_existing`), and count the connection as open. With `refuse=True`, raise
    ForeignAccessError if other code has the file open.
    """
    status = look_at(path)
    if status is None:
        return open_existing(path, options, timeout=timeout)  # SQLite raises the error for a missing file
    guard = guard_of(identity_of(status))
    # Count the connection before SQLite opens the file. Otherwise another thread would refuse the new descriptor.
    guard.opening(path, refuse=refuse)
    try:
        connection = open_existing(path, options, timeout=timeout)
    except BaseException:
        with guard.closing():
            pass
        raise
    connection.closing = guard.closing
    return connection


def protect(database: FileIdentityCheck) -> None:
    """Make `sqlite3.connect` raise an error for the file. The hook does not detect ATTACH or calls from C code."""
    global _is_hook_installed
    with _mutex:
        _protected.add(database)
        # Do not install the hook at import, because the hook slows audited calls.
        if not _is_hook_installed:
            _is_hook_installed = True
            sys.addaudithook(_refuse_connect)


def unprotect(database: FileIdentityCheck) -> None:
    """Stop protecting the file for a closed `Database` object."""
    with _mutex:
        _protected.discard(database)


def _refuse_connect(event: str, arguments: tuple[object, ...]) -> None:
    if event != "sqlite3.connect":
        return
    with _mutex:
        refused = {identity for identity, guard in _guards.items() if guard.connections}
        refused |= {database.identity for database in _protected if database.identity is not None}
    if not refused:
        return
    target = arguments[0]
    if not isinstance(target, (str, bytes, os.PathLike)):
        return
    name = os.fsdecode(target)
    names = [name, unquote(urlsplit(name).path)] if name.startswith("file:") else [name]
    for candidate in names:
        with suppress(OSError, ValueError):
            if identity_of(Path(candidate).stat()) in refused:
                raise ForeignAccessError(
                    f"{quoted(Path(candidate))} is open as a homeagent database in this process, and closing it in a "
                    "second SQLite library would drop its locks: use Database.read_connection or a store"
                )


def _after_fork_in_child() -> None:
    # Replace the mutex. In the child, the thread that holds the mutex can be missing.
    global _mutex
    _mutex = threading.RLock()
    for guard in _guards.values():
        guard.forget()
    _guards.clear()
    _protected.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
