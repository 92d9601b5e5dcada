"""Whether a database's files are still the ones that were opened.

A file that is deleted or replaced under an open connection lives on without a name: SQLite would go on reading and
writing it, and all of that would be gone with the process (https://sqlite.org/howtocorrupt.html, section 4). SQLite
looks before it writes a rollback journal, and not at all in write-ahead-log mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from homeagent.clock import monotonic
from homeagent.engine.files.database_file import identity_of, sidecars
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import CorruptDatabaseError, DatabaseMovedError

__all__ = ["FileIdentityCheck"]

Identity = tuple[int, int]

# A unit that only reads, or that may be lost at a power cut anyway, may act on what is this old, in seconds. A look
# takes some microseconds, and a unit not many more.
_INTERVAL = 0.01

# Where a file of no more bytes was a database, it was emptied.
_NO_CONTENT = 0


class FileIdentityCheck:
    """Watches the file of one open database, its log and the log's index.

    Args:
        path: the file, which need not exist yet.
        strict: whether every commit looks, and not only the first one in ten milliseconds.
        monotonic: the clock to measure that with, in seconds.
        on_moved: is called before DatabaseMovedError is raised.

    Attributes:
        monotonic: that clock.
        due: from when on by it the last look is too old. Who begins a unit compares for himself, which takes less
            than a call, and calls `after_begin` then.
    """

    def __init__(
        self,
        path: Path,
        *,
        strict: bool,
        monotonic: Callable[[], float] = monotonic,
        on_moved: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_moved = on_moved
        self._path = path
        self._strict = strict
        self.monotonic = monotonic
        # As text: to turn a path into text costs as much as to look at it.
        self._name = str(path)
        self._beside = [str(each) for each in sidecars(path)[:2]]
        self._identity: Identity | None = None
        self._known: dict[str, Identity] = {}
        self.due = 0.0
        self.marked_corrupt: str | None = None
        """Why nothing of this database is to be used any more: its content was found to be damaged."""

    @property
    def identity(self) -> tuple[int, int] | None:
        """Which file was opened; None before the first connection."""
        return self._identity

    @property
    def remembers_log(self) -> bool:
        """Whether the log or its index is known, so that another file in its place is noticed."""
        return bool(self._known)

    def before_connect(self) -> None:
        """Look before a connection is opened.

        While no connection is open, another process may delete the log and its index: they are compared with what is
        known of them, and none is remembered here.

        Raises:
            DatabaseMovedError: another file has the name now, or none; or the log or its index was replaced.
        """
        self._look(beside=self.remembers_log, remember=False)

    def connected(self, *, beside: bool = True) -> None:
        """Say that a connection was opened and has read; the first one decides which file it is.

        Args:
            beside: whether to remember the log and its index. `disconnected` must be called then.

        Raises:
            DatabaseMovedError: another file has the name now; or the log or its index was replaced.
        """
        if self._identity is None:
            status = self._status(self._name)
            self._identity = None if status is None else identity_of(status)
        else:  # the first one may have emptied the file, of which a power cut left a part of the first transaction
            self._look(beside=beside)

    def disconnected(self) -> None:
        """Say that the last connection is closed: SQLite may delete the files beside, and make them anew."""
        self._known = {}

    def after_begin(self) -> None:
        """Look, since the last look is too old. A connection that has begun holds the files beside the database.

        Raises:
            DatabaseMovedError: the file, its log or the log's index is gone, or is another one.
            CorruptDatabaseError: it was condemned.
        """
        self._look()
        self.due = self.monotonic() + _INTERVAL

    def before_commit(self) -> None:
        """Look, always where a commit must be durable: what is acknowledged was in the file that has the name.

        Raises:
            DatabaseMovedError: as in `after_begin`.
        """
        if self.monotonic() >= self.due:
            self.after_begin()
        elif self._strict:
            self._look(beside=False)

    def find_moved(self, *, beside: bool = False) -> DatabaseMovedError | None:
        """Return what is wrong with the files' names, None where all is well.

        Args:
            beside: whether to check the log and its index too.
        """
        try:
            self._look(beside=beside)
        except DatabaseMovedError as moved:
            return moved
        except CorruptDatabaseError:
            pass  # condemned before: what is asked here is another question
        return None

    def _look(self, *, beside: bool = True, remember: bool = True) -> None:
        try:
            self._compare(beside=beside, remember=remember)
        except DatabaseMovedError:
            self._on_moved()
            raise

    def _compare(self, *, beside: bool, remember: bool) -> None:
        # Where this look finds fault, so does the next one.
        due, self.due = self.due, 0.0
        if self.marked_corrupt is not None:
            raise CorruptDatabaseError(self.marked_corrupt)
        if self._identity is None:
            return
        status = self._status(self._name)
        if status is None:
            raise DatabaseMovedError(
                f"{quoted(self._path)} was deleted or moved away while it was open: put the same file back, or stop "
                "and restore a backup. While this process runs, /proc/PID/fd still leads to what was in it"
            )
        if identity_of(status) != self._identity:
            raise DatabaseMovedError(
                f"{quoted(self._path)} was replaced by another file while it was open: open the database again if "
                "that is meant to be it, or put the one that was there back"
            )
        if status.st_size == _NO_CONTENT:
            raise DatabaseMovedError(f"{quoted(self._path)} was emptied while it was open: stop, and restore a backup")
        for name in self._beside if beside else ():
            status = self._status(name)
            known = self._known.get(name)
            found = None if status is None else identity_of(status)
            if known is None:
                if found is not None and remember:
                    self._known[name] = found
            elif found != known:
                raise DatabaseMovedError(
                    f"{quoted(Path(name))} was deleted or replaced while the database was open: stop, and restore a "
                    "backup. While this process runs, /proc/PID/fd still leads to the log that it had"
                )
        self.due = due

    @staticmethod
    def _status(name: str) -> os.stat_result | None:
        try:
            return os.lstat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            with explained("inspect", Path(name)):
                raise
