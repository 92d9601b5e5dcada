"""Refuse statements that change certain tables, for example while the revisions of an application run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import apsw

_WRITES = frozenset({apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE, apsw.SQLITE_DROP_TABLE})
_TRIGGERS = frozenset({apsw.SQLITE_CREATE_TRIGGER, apsw.SQLITE_DROP_TRIGGER})

# Actions for which SQLite passes the name of the table as the second argument
# (https://sqlite.org/c3ref/c_alter_table.html).
_OF_TABLE = {
    apsw.SQLITE_ALTER_TABLE,
    apsw.SQLITE_CREATE_INDEX,
    apsw.SQLITE_CREATE_TEMP_TRIGGER,
    apsw.SQLITE_DROP_INDEX,
}


@contextmanager
def refuse_changes(
    raw: Any, tables: Collection[str], triggers: Collection[str], refused: Callable[[str], None]
) -> Iterator[None]:
    """While the block runs, refuse each statement that changes the rows, columns, indexes or triggers of the given
    tables.

    SQLite asks the authorizer while it compiles a statement (https://sqlite.org/c3ref/set_authorizer.html), so a
    refused statement has no effect. A change of the schema through `PRAGMA writable_schema` is also refused.

    Args:
        raw: driver's connection.
        tables: names of the tables, in lower case.
        triggers: names of the allowed triggers. A statement can create or drop an allowed trigger, and an allowed
            trigger can write to the tables.
        refused: function that is called with the name of the table before SQLite raises the error.
    """

    def judge(action: int, first: str | None, second: str | None, _schema: object, by: str | None) -> int:
        if action in _WRITES:
            table = None if by in triggers else first
        elif action in _TRIGGERS:
            table = None if first in triggers else second
        elif action in _OF_TABLE:
            table = second
        else:
            is_unsafe = action == apsw.SQLITE_PRAGMA and first == "writable_schema" and second is not None
            if is_unsafe:
                refused("sqlite_master")
            return apsw.SQLITE_DENY if is_unsafe else apsw.SQLITE_OK
        if table is None or table.lower() not in tables:
            return apsw.SQLITE_OK
        refused(table.lower())
        return apsw.SQLITE_DENY

    raw.set_authorizer(judge)
    try:
        yield
    finally:
        raw.set_authorizer(None)
