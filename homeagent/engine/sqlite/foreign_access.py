"""A second SQLite library in the process does no harm to an open database.

POSIX locks belong to a process. When another library of the process, such as the interpreter's `sqlite3`, closes a
descriptor of the database, the locks of homeagent's connections are gone, and other processes may delete the log under
them (https://sqlite.org/howtocorrupt.html, section 2.2). Two measures:

- Read locks on open file descriptions (Linux: `F_OFD_SETLK`), one on the file and one on its WAL index. They survive
  the close of any other descriptor, and keep another library from taking the database for closed.
- An audit hook that refuses `sqlite3.connect` to a file that a `Database` has open.

Neither sees a host that writes through `ATTACH` or a C library. See docs/operations.md.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from homeagent.engine.files.database_file import OPEN_FLAGS, identity_of, look_at, sidecars
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.dialect import Connection, connect
from homeagent.errors import ForeignAccessError

__all__ = ["FileGuard", "guard_of", "open_guarded"]

Identity = tuple[int, int]

# SQLite's SHARED range in the database file, and the byte of the WAL index that each process with a connection holds a
# read lock on (os_unix.c: SHARED_FIRST, SHARED_SIZE, UNIX_SHM_DMS).
_SHARED_RANGE = (0x40000002, 510)
_WAL_INDEX_BYTE = (128, 1)

_DESCRIPTORS = Path("/proc/self/fd")

# Not by the name in `fcntl` alone: `_lock` knows the layout of Linux's structure only.
_HAS_OFD_LOCKS = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")


class FileGuard:
    """Holds the locks of one database file for as long as this process has a connection to it.

    Args:
        path: the file.
        identity: its device and inode.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._identity = identity
        self._mutex = threading.RLock()
        self._connections = 0
        self._descriptors: list[int] = []
        self._holds = False
        self._is_over = False

    def opened(self) -> bool:
        """Count a connection that was opened; return False if the last one was closed meanwhile."""
        with self._mutex:
            self._connections += not self._is_over
            return not self._is_over

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Count a connection that is closed in the block.

        The locks are released before the last one closes, since SQLite then locks the file to move the log into it.
        The descriptors are closed after that: closing them earlier would drop SQLite's own locks.

        Raises:
            DatabaseError: if the system could not unlock or close a file. The connection is closed.
        """
        with self._mutex, explained("unlock", self._path):
            self._connections -= 1
            is_last = self._connections == 0
            failure = self._release() if is_last else None
            try:
                yield
            finally:
                if is_last:
                    self._is_over = True
                    try:
                        self.forget()
                    finally:
                        with _registry:
                            if _guards.get(self._identity) is self:
                                del _guards[self._identity]
            if failure is not None:
                raise failure

    def hold(self) -> None:
        """Take the locks, if they are not held. A connection has read the database, so that its WAL index exists."""
        with self._mutex:
            if self._holds or not self._connections:
                return
            _install_hook()
            if _HAS_OFD_LOCKS:
                spans = ((self._path, _SHARED_RANGE), (sidecars(self._path)[1], _WAL_INDEX_BYTE))
                for number, (path, span) in enumerate(spans):
                    if look_at(path) is None:
                        return  # a file that can only be read, next to which SQLite makes no WAL index
                    with explained("lock", path):
                        # A descriptor stays open if the next step fails: its close would drop SQLite's own locks.
                        if number == len(self._descriptors):
                            self._descriptors.append(os.open(path, os.O_RDONLY | OPEN_FLAGS))
                        _lock(self._descriptors[number], fcntl.F_RDLCK, *span)
            self._holds = True

    def _release(self) -> OSError | None:
        """Release the locks, and return the last error: the connection must be closed before it is raised."""
        failure = None
        for descriptor in self._descriptors:
            try:
                _lock(descriptor, fcntl.F_UNLCK, 0, 0)
            except OSError as error:
                failure = error
        self._holds = False
        return failure

    def forget(self) -> None:
        """Close the descriptors: no connection is open, or this is a forked child, whose copies keep the locks."""
        descriptors, self._descriptors = self._descriptors, []
        with ExitStack() as closing:  # closes the others too if one close fails
            for descriptor in descriptors:
                closing.callback(os.close, descriptor)


def _lock(descriptor: int, kind: int, start: int, length: int) -> None:
    # struct flock, its l_pid 0: https://man7.org/linux/man-pages/man2/F_OFD_SETLK.2const.html
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0))


# A connection is opened and counted in one step. Otherwise another thread would take its descriptor for a foreign one.
_opening = threading.RLock()
_registry = threading.RLock()
_guards: dict[Identity, FileGuard] = {}


def guard_of(path: Path, identity: Identity) -> FileGuard:
    """Return the guard of a file, the same for all databases of this process."""
    with _registry:
        guard = _guards.get(identity)
        if guard is None:
            guard = _guards[identity] = FileGuard(path, identity)
        return guard


def open_guarded(path: Path, uri: str, *, timeout: float, refuse: bool = False) -> Connection:
    """Open an existing database with a connection that its guard counts until it is closed.

    Args:
        path: the file.
        uri: the file as SQLite takes it.
        timeout: how long a statement waits for a lock, in seconds.
        refuse: whether to refuse a file of which this process has a descriptor that is not homeagent's.

    Raises:
        ForeignAccessError: there is such a descriptor.
        apsw.Error: SQLite can't open the file.
    """
    with _opening:
        if refuse:
            _refuse_foreign_descriptors(path)
        connection = connect(uri, uri=True, create=False, timeout=timeout)
        status = look_at(path)
        while status is not None:
            guard = guard_of(path, identity_of(status))
            if guard.opened():
                connection.closing = guard.closing
                break
    return connection


def _refuse_foreign_descriptors(path: Path) -> None:
    """Refuse a file of which this process has a descriptor that is not homeagent's.

    Its close would drop the locks that are about to be taken. Nothing can be told of a file that homeagent has open
    already, nor on a system without /proc.

    Raises:
        ForeignAccessError: there is such a descriptor.
    """
    status = look_at(path)
    if status is None or identity_of(status) in _guards:
        return
    if not _DESCRIPTORS.is_dir():
        return
    with explained("look into", _DESCRIPTORS):
        for link in _DESCRIPTORS.iterdir():
            with suppress(OSError):  # closed since it was listed
                if identity_of(link.stat()) == identity_of(status):
                    raise ForeignAccessError(
                        f"this process has {quoted(path)} open already, as descriptor {link.name}, by other means than "
                        "homeagent: close that before Database.open, since its close would drop SQLite's locks"
                    )


def _refuse_connect(event: str, arguments: tuple[object, ...]) -> None:
    if event != "sqlite3.connect" or not _guards:
        return
    target = arguments[0]
    if not isinstance(target, (str, bytes, os.PathLike)):
        return
    name = os.fsdecode(target)
    names = [name, unquote(urlsplit(name).path)] if name.startswith("file:") else [name]
    for candidate in names:
        with suppress(OSError, ValueError):
            if identity_of(Path(candidate).stat()) in _guards:
                raise ForeignAccessError(
                    f"{quoted(Path(candidate))} is open as a homeagent database in this process, and a second SQLite "
                    "library would drop its locks: read it through Database.read_connection, or use a store"
                )


_is_hooked = False


def _install_hook() -> None:
    # A hook can't be removed, and slows each audited call a little: so it is installed with the first open file.
    global _is_hooked
    if not _is_hooked:
        _is_hooked = True
        sys.addaudithook(_refuse_connect)


def _after_fork_in_child() -> None:
    # Threads that do not exist in the child may have held the locks.
    global _opening, _registry
    _opening, _registry = threading.RLock(), threading.RLock()
    for guard in _guards.values():
        guard.forget()
    _guards.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
