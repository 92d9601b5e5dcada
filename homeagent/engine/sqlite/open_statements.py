"""Close the unfinished statements of an ORM session at the end of its transaction. In SQLite a statement with unfetched
rows keeps the read snapshot after COMMIT and ROLLBACK, so the next unit of work would read old rows.
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
    """Close the unfinished statements of an ORM session at each commit and rollback of its connection."""
    if _KEY in connection.info:
        return
    cursors: WeakSet[Any] = WeakSet()
    connection.info[_KEY] = cursors

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # Do not close a store's cursor, which the connection uses for later statements.
        if isinstance(context, DefaultExecutionContext):
            cursors.add(cursor)

    def end(connection: Connection) -> None:
        for cursor in list(cursors):
            cursor.close()
        cursors.clear()

    event.listen(connection, "before_cursor_execute", note)
    event.listen(connection, "commit", end)
    event.listen(connection, "rollback", end)
