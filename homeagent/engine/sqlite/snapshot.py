"""A link to read on, whose transaction is a statement that was begun and not finished.

Outside of BEGIN and COMMIT, SQLite ends a read transaction when the last active statement ends
(https://sqlite.org/lang_transaction.html#implicit_versus_explicit_transactions). So one statement that has shown its
only row, and was not asked for more, holds the snapshot for all others. It costs as little as BEGIN and COMMIT alone,
which take the snapshot only with the first read after them: a statement less in every unit that reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from homeagent.engine.announcing import AnnouncingCursor
from homeagent.engine.link import Link

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["SnapshotLink"]

# One row whatever the file holds, and the snapshot is taken to find it.
_HOLD = "SELECT EXISTS (SELECT 1 FROM sqlite_master)"


class SnapshotLink(Link):
    """A connection that only reads, one snapshot at a time.

    Args:
        connection: SQLAlchemy's.
        **options: as of every link.
    """

    __slots__ = ("_hold", "_is_holding", "_let_go", "_shows_commands")

    def __init__(self, connection: Connection, **options: Any) -> None:
        super().__init__(connection, **options)
        cursor: Any = self._raw.cursor()
        self._hold: Callable[[str], Any] = cursor.execute
        self._let_go: Callable[[], Any] = cursor.fetchone
        self._is_holding = False
        # Who listens to the statements of a unit wants to see where it begins and ends.
        self._shows_commands = isinstance(self._cursor, AnnouncingCursor)

    def begin(self) -> None:
        """Take the snapshot."""
        if self._shows_commands:
            super().begin()
            return
        fault: BaseException
        try:
            self._hold(_HOLD)
        except self._driver_errors as error:
            fault = self._translate(error)
        else:
            self._is_holding = True
            watch = self._watch
            if watch is not None and watch.monotonic() >= watch.due:
                self._look_after_begin(watch)
            return
        raise fault

    def commit(self) -> None:
        """Give the snapshot up."""
        if self._is_holding:
            self._end_hold()
        else:
            super().commit()

    def rollback(self) -> None:
        """Give the snapshot up; that there is none is fine."""
        if self._is_holding:
            self._end_hold()
        super().rollback()

    def _end_hold(self) -> None:
        fault: BaseException
        try:
            # There is no second row: the statement ends. Where an interrupt comes before that, the rollback ends it.
            self._let_go()
        except self._driver_errors as error:
            fault = self._translate(error)
        else:
            self._is_holding = False
            return
        raise fault

    @property
    def in_transaction(self) -> bool:
        """Whether there is a snapshot."""
        return self._is_holding or super().in_transaction

    def orm_connection(self) -> Connection:
        """Return SQLAlchemy's connection, in a transaction that has the same snapshot."""
        if self._is_holding:
            self.execute("BEGIN")
            self._end_hold()
        return super().orm_connection()

    def abandon(self) -> None:
        """Have everything that is done on it refused: see `Link.abandon`."""
        super().abandon()
        # The cursor stays with the connection, which is kept from being closed.
        self._is_holding = False
