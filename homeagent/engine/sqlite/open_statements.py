"""Close the unfinished statements of an ORM session at the end of its transaction.

In SQLite a statement with unfetched rows stays open after COMMIT and ROLLBACK, and keeps the read snapshot. With an
open statement, the next unit of work would read old rows. If another process commits while a statement is open, the
next write of the connection fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine.default import DefaultExecutionContext

if TYPE_CHECKING:
    from sqlalchemy import Connection

_KEY = "homeagent_cursors"


def end_with_transactions(connection: Connection) -> None:
    """Close the unfinished statements of an ORM session at each commit and rollback of its connection. A fetch from a
    closed statement raises an error.
    """
    if _KEY in connection.info:
        return
    cursors: WeakSet[Any] = WeakSet()
    connection.info[_KEY] = cursors

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # Do not close a store's cursor, because the connection uses the cursor for later statements. The instrumented
        # cursor also calls this listener.
        if isinstance(context, DefaultExecutionContext):
            cursors.add(cursor)

    def end(connection: Connection) -> None:
        for cursor in list(cursors):
            cursor.close()
        cursors.clear()

    event.listen(connection, "before_cursor_execute", note)
    event.listen(connection, "commit", end)
    event.listen(connection, "rollback", end)
