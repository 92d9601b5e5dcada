"""Check that a database's name still refers to the opened file. In WAL mode, SQLite itself does not check the name.
Changes to a replaced file are lost when the process ends (https://sqlite.org/howtocorrupt.html, section 4).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from homeagent.clock import monotonic
from homeagent.engine.files.database_file import identity_of, sidecars
from homeagent.engine.files.system_errors import explained
from homeagent.errors import CorruptDatabaseError, DatabaseMovedError

# Interval between two checks, in seconds. A check takes almost as long as a small unit of work.
_INTERVAL = 0.01


class FileIdentityCheck:
    """Checks the identities of an open database's file, WAL and WAL index. With `strict=True`, every commit checks the
    file. `on_moved()` returns a suffix for the message about a moved file. `check.due` is the earliest time of the next
    check (monotonic clock). If `check.marked_corrupt` is set, every check raises CorruptDatabaseError.
    """

    def __init__(self, path: Path, *, strict: bool, on_moved: Callable[[], str] = str) -> None:
        self._on_moved = on_moved
        self._strict = strict
        self.monotonic: Callable[[], float] = monotonic
        # Convert the paths once. A conversion to text takes as long as a check.
        self._name = str(path)
        self._wal_files = [str(each) for each in sidecars(path)[:2]]
        self.identity: tuple[int, int] | None = None
        self._known: dict[str, tuple[int, int]] = {}
        self.due: float = 0.0
        self.marked_corrupt: str | None = None

    @property
    def remembers_log(self) -> bool:
        """True if the identity of the WAL or WAL index is recorded."""
        return bool(self._known)

    def before_connect(self) -> None:
        """Check the files before a connection opens. Do not record the WAL's identity, because another process can
        still delete the WAL.
        """
        self._check(beside=self.remembers_log, remember=False)

    def connected(self) -> None:
        """Check the files of a new connection after its first read. The caller must later call `disconnected()`."""
        if self.identity is None:
            status = _status(self._name)
            self.identity = None if status is None else identity_of(status)
        else:
            # Skip the check for the first connection. On the first connection, SQLite can truncate an incomplete file
            # to zero bytes.
            self._check()

    def disconnected(self) -> None:
        """Forget the WAL files. Without an open connection, SQLite can delete the WAL files."""
        self._known = {}

    def after_begin(self) -> None:
        """Check the files after BEGIN. During a transaction, SQLite does not delete the WAL files."""
        self._check()
        self.due = self.monotonic() + _INTERVAL

    def before_commit(self) -> None:
        """Check the files at most once every 10 ms. With `strict=True`, check the database file at every call."""
        if self.monotonic() >= self.due:
            self.after_begin()
        elif self._strict:
            self._check(beside=False)

    def find_moved(self, *, beside: bool = False) -> DatabaseMovedError | None:
        """Return an error if the file was deleted or replaced. With `beside=True`, also check the WAL and its index."""
        try:
            self._check(beside=beside)
        except CorruptDatabaseError as error:  # a database can be corrupt without being moved
            return error if isinstance(error, DatabaseMovedError) else None
        return None

    def _check(self, *, beside: bool = True, remember: bool = True) -> None:
        """Raise an error for a moved file or a database marked corrupt. With `beside=True`, check the WAL too."""
        due, self.due = self.due, 0.0  # after an error, the next unit must check the files again
        if self.marked_corrupt is not None:
            raise CorruptDatabaseError(self.marked_corrupt)
        problem = None if self.identity is None else self._problem(beside=beside, remember=remember)
        if problem is not None:
            raise DatabaseMovedError(problem + self._on_moved())
        self.due = due

    def _problem(self, *, beside: bool, remember: bool) -> str | None:
        status = _status(self._name)
        if status is None:
            return (
                f"{self._name!r} was deleted or moved away while it was open: put the same file back, or stop "
                "and restore a backup. While this process runs, its content is still readable in /proc/PID/fd"
            )
        if identity_of(status) != self.identity:
            return (
                f"{self._name!r} was replaced by another file while it was open: put the old file back, or open "
                "the database again to use the new file"
            )
        if status.st_size == 0:
            return f"{self._name!r} was emptied while it was open: stop, and restore a backup"
        for name in self._wal_files if beside else ():
            status = _status(name)
            found = None if status is None else identity_of(status)
            if name in self._known:
                if found != self._known[name]:
                    return (
                        f"{name!r} was deleted or replaced while the database was open: stop, and restore a "
                        "backup. While this process runs, the old file's content is still readable in /proc/PID/fd"
                    )
            elif found is not None and remember:
                self._known[name] = found
        return None


def _status(name: str) -> os.stat_result | None:
    """Return the result of `os.lstat()`. If the path does not exist or leads through a file, return None."""
    try:
        return os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        with explained("inspect", Path(name)):
            raise
