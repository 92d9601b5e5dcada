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

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._identity = identity
        self._mutex = threading.RLock()
        self._connections = 0
        self._descriptors: list[int] = []
        self._holds = False
        self.is_closed: bool = False

    def opened(self) -> bool:
        """Count a new connection, and return True. If the guard is already closed, only return False."""
        with self._mutex:
            self._connections += not self.is_closed
            return not self.is_closed

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Count a connection as closed, and run the block that closes the connection. To close the last connection,
        SQLite needs an exclusive lock. So first release the guard's locks. Close the guard's descriptors only after the
        connection. Otherwise the connection would lose SQLite's locks.
        """
        with self._mutex, explained("unlock", self._path):
            self._connections -= 1
            failure = None if self._connections else self._release()
            try:
                yield
            except apsw.BusyError:
                self._connections += 1  # the file stays open, because another cursor has an unfinished statement
                raise
            finally:
                if not self._connections:
                    try:
                        self.forget()
                    finally:
                        # Do not replace a guard with open descriptors (`test_a_closing_guard_stays_registered`).
                        # Closing the descriptors would release the locks of all connections.
                        with _registry:
                            # A signal handler can have opened a connection.
                            self.is_closed = self._connections == 0
                            if self.is_closed and _guards.get(self._identity) is self:
                                del _guards[self._identity]
            if failure is not None:
                raise failure

    def hold(self) -> None:
        """If a connection is open, take the read locks. Call the method after a read. SQLite creates the WAL index at
        the first read.
        """
        with self._mutex:
            if self._holds or not self._connections:
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


# Hold the lock `_opening` while a connection is opened and counted. Without the lock `_opening`, another thread could
# wrongly raise ForeignAccessError.
_opening = threading.RLock()
_is_hook_installed = False
_uncounted = 0
"""Number of connections in `open_guarded()` that are not counted yet."""
_registry = threading.RLock()
_guards: dict[Identity, FileGuard] = {}
_protected: weakref.WeakSet[FileIdentityCheck] = weakref.WeakSet()
"""Open databases. Before the first unit, a database can have no guard."""


def guard_of(path: Path, identity: Identity) -> FileGuard:
    """Return the guard of a file. All `Database` objects of the file in this process share the guard."""
    with _registry:
        guard = _guards.get(identity)
        if guard is None:
            guard = _guards[identity] = FileGuard(path, identity)
        return guard


def open_guarded(path: Path, options: str, *, timeout: float, refuse: bool = False) -> Connection:
    """Open an existing database (see `open_existing`), and count the connection as open. With `refuse=True`, raise
    ForeignAccessError if other code has the file open.
    """
    global _uncounted
    with _opening:
        # A signal handler can call this function during another call. Then do not search, because the search would find
        # homeagent's own descriptor.
        if refuse and not _uncounted:
            _refuse_foreign_descriptors(path)
        _uncounted += 1
        try:
            connection = open_existing(path, options, timeout=timeout)
            try:
                status = look_at(path)
                while status is not None:
                    guard = guard_of(path, identity_of(status))
                    if guard.opened():
                        connection.closing = guard.closing
                        break
            except BaseException:
                connection.close()
                raise
        finally:
            _uncounted -= 1
    return connection


def _refuse_foreign_descriptors(path: Path) -> None:
    """Raise ForeignAccessError if other code of this process has the file open."""
    status = look_at(path)
    if status is None or (identity := identity_of(status)) in _guards or not _DESCRIPTORS.is_dir():
        return
    with explained("look into", _DESCRIPTORS), os.scandir(_DESCRIPTORS) as links:
        for link in links:
            with suppress(OSError):  # The descriptor was closed after the listing.
                # Read the guards again. A signal handler can have opened the file.
                if identity_of(link.stat()) == identity and identity not in _guards:
                    raise ForeignAccessError(
                        f"this process has {quoted(path)} open already, as descriptor {link.name}, but not through "
                        "homeagent: close the descriptor before Database.open, since a later close would drop "
                        "SQLite's locks"
                    )


def protect(database: FileIdentityCheck) -> None:
    """Make `sqlite3.connect` raise an error for the file. The hook does not detect ATTACH or calls from C code."""
    global _is_hook_installed
    with _registry:
        _protected.add(database)
        # Do not install the hook at import, because the hook slows audited calls.
        if not _is_hook_installed:
            _is_hook_installed = True
            sys.addaudithook(_refuse_connect)


def unprotect(database: FileIdentityCheck) -> None:
    """Stop protecting the file for a closed `Database` object."""
    with _registry:
        _protected.discard(database)


def _refuse_connect(event: str, arguments: tuple[object, ...]) -> None:
    if event != "sqlite3.connect":
        return
    with _registry:
        refused = {*_guards, *(database.identity for database in _protected)}
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
    # Replace the locks. In the child, the thread that holds a lock can be missing.
    global _opening, _registry, _uncounted
    _opening, _registry, _uncounted = threading.RLock(), threading.RLock(), 0
    for guard in _guards.values():
        guard.forget()
    _guards.clear()
    _protected.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
