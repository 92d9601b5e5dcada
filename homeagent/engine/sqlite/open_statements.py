"""Statements whose rows were not all fetched: in SQLite they outlive COMMIT and ROLLBACK, and the snapshot with them.

Who keeps a result that it read only in part, such as a generator that nobody goes on with, would keep the snapshot of
a link that others use by then: they would read the past, and could write no more once another process had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine.default import DefaultExecutionContext

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["end_with_transactions"]

_KEY = "homeagent_cursors"


def end_with_transactions(connection: Connection) -> None:
    """Have the statements of an ORM session ended with their transaction; what is left of a result is refused then."""
    if _KEY in connection.info:
        return
    cursors: WeakSet[Any] = WeakSet()
    connection.info[_KEY] = cursors

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # Where somebody listens, a link tells of its own cursor as well, which it goes on using.
        if isinstance(context, DefaultExecutionContext):
            cursors.add(cursor)

    def end(connection: Connection) -> None:
        for cursor in list(cursors):
            cursor.close()
        cursors.clear()

    event.listen(connection, "before_cursor_execute", note)
    event.listen(connection, "commit", end)
    event.listen(connection, "rollback", end)
