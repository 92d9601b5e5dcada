"""A long-lived connection to a SQLite file, and a busy handler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import uniform
from time import sleep
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine.default import DefaultExecutionContext

from homeagent.clock import monotonic
from homeagent.engine.connection import StoreConnection, refuse_statement
from homeagent.engine.sqlite.constraints import named_conflict
from homeagent.engine.sqlite.dialect import StatementCursor, Undecodable, decoded_row, undecoded_columns

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.engine import Engine
    from homeagent.engine.statements import Compiled, Parameters, Row
    from homeagent.errors import HomeAgentError

_PAUSE = (0.002, 0.010)
"""Range of the random pause between two tries, in seconds. With equal pauses, two processes could always try at the
same time.
"""

_CURSORS = "homeagent_cursors"
"""Key in the `info` of a connection. The value is the set of an ORM session's cursors."""

_NOT_UTF8 = "holds text that is not UTF-8"


class SQLiteConnection(StoreConnection):
    """An apsw connection."""

    __slots__ = ()

    def __init__(self, connection: Connection, engine: Engine, *, read_only: bool) -> None:
        super().__init__(connection, engine, read_only=read_only)
        self.changes: Callable[[], int] = self._raw.changes

    @staticmethod
    def _open_cursor(raw: Any) -> StatementCursor:
        return raw.statement_cursor()  # type: ignore[no-any-return]  # `raw` is Any

    def _commit_failure(self, error: BaseException) -> HomeAgentError:
        # Do not call `after_failed_commit()` twice. SQLAlchemy calls the driver's `commit()`. The driver's `commit()`
        # already calls `after_failed_commit()`.
        unknown = self._raw.after_failed_commit(error) if self._root is None else None
        return unknown or super()._commit_failure(error)

    def _refused(self, error: BaseException, sql: str) -> HomeAgentError:
        """If a constraint refused the statement, return ConflictError."""
        if not (self.read_only or self.in_transaction):
            self._execute = refuse_statement
        return named_conflict(self._raw, error, sql) or super()._refused(error, sql)

    def _insert(self, into: str, width: int, rows: Iterable[Row]) -> None:
        self.require_transaction()
        super()._insert(into, width, rows)

    def end_orm(self) -> None:
        """Also close unfinished statements if the transaction of the batch continues."""
        if self._view is not None and self.in_transaction:
            for cursor in list(self._connection.info.get(_CURSORS, ())):
                cursor.close()
        super().end_orm()

    def look_for_commits(self) -> bool:
        """Return True if another connection has committed since the last call."""
        self.check_file()  # the data_version of a replaced file does not change
        version = self.execute("PRAGMA data_version").fetchall()
        known, self.memory["data_version"] = self.memory.get("data_version"), version
        return bool(version != known)

    def _unread_rows(
        self, error: BaseException, compiled: Compiled[Any], parameters: Parameters
    ) -> HomeAgentError | None:
        if not isinstance(error, UnicodeDecodeError) or not compiled.columns:
            return None
        if compiled.writes:
            return compiled.unreadable_at(None, (), parameters, _NOT_UTF8)
        names = [f"c{place}" for place in range(len(compiled.columns))]
        sql = f"WITH found({', '.join(names)}) AS ({compiled.sql}) SELECT {undecoded_columns(names)} FROM found"  # noqa: S608  own SQL
        # Use the same cursor, which ends the failed statement.
        for values in self._execute(sql, compiled.bind(parameters)).fetchall():
            row = decoded_row(values)
            found = [place for place, value in enumerate(row) if isinstance(value, Undecodable)]
            if found:
                return compiled.unreadable_at(found[-1], row, parameters, _NOT_UTF8)
        return None


def busy_handler(timeout: float) -> Callable[[int], bool]:
    """Return a busy handler for SQLite (https://sqlite.org/c3ref/busy_handler.html). The handler pauses before the next
    try, and returns False after the timeout.

    The pauses of SQLite's own busy handler grow to 100 ms. With eight writing processes, SQLite's handler made some
    processes wait for seconds. Shorter pauses (1 to 5 ms) made more writes wait.
    """
    since = 0.0

    def pause(attempts: int) -> bool:
        nonlocal since
        now = monotonic()
        if attempts == 0:
            since = now
        left = timeout - (now - since)
        if left <= 0:
            return False
        sleep(min(uniform(*_PAUSE), left))  # noqa: S311  the random number is not a secret
        return True

    return pause


def end_with_transactions(connection: Connection) -> None:
    """At each commit and rollback, close an ORM session's unfinished statements. With an unfinished statement, the next
    unit would read old rows.
    """
    if _CURSORS in connection.info:
        return
    cursors: WeakSet[Any] = WeakSet()
    connection.info[_CURSORS] = cursors

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # Do not close a store's cursor. The store uses the cursor again for later statements.
        if isinstance(context, DefaultExecutionContext):
            raw: Any = connection.connection.driver_connection
            raw.require_transaction()
            cursors.add(cursor)

    def end(connection: Connection) -> None:
        for cursor in list(cursors):
            cursor.close()
        cursors.clear()

    event.listen(connection, "before_cursor_execute", note)
    event.listen(connection, "commit", end)
    event.listen(connection, "rollback", end)
