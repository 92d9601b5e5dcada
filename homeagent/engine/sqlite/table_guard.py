"""Refuse statements that change certain tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import apsw

_WRITES = frozenset({apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE, apsw.SQLITE_DROP_TABLE})
_TRIGGERS = frozenset({apsw.SQLITE_CREATE_TRIGGER, apsw.SQLITE_DROP_TRIGGER})

# For these actions, SQLite passes the table's name as the second argument
# (https://sqlite.org/c3ref/c_alter_table.html).
_OF_TABLE = {
    apsw.SQLITE_ALTER_TABLE,
    apsw.SQLITE_CREATE_INDEX,
    apsw.SQLITE_CREATE_TEMP_TRIGGER,
    apsw.SQLITE_DROP_INDEX,
}


@contextmanager
def refuse_changes(
    raw: Any,
    tables: Collection[str],
    triggers: Collection[str],
    refused: Callable[[str], None],
    refuse_end: Callable[[str | None], None],
) -> Iterator[None]:
    """During the block, refuse changes of the tables' rows, columns, indexes and triggers. Also refuse statements
    that set `PRAGMA writable_schema`. Pass the names of the tables in lower case. The argument `triggers=` names
    triggers that may change the tables. Before COMMIT and ROLLBACK, call `refuse_end`, which can raise an error.
    SQLite refuses a statement before the execution (https://sqlite.org/c3ref/set_authorizer.html).
    """

    def judge(action: int, first: str | None, second: str | None, _schema: object, by: str | None) -> int:
        if action in _WRITES:
            table = None if by in triggers else first
        elif action in _TRIGGERS:
            table = None if first in triggers else second
        elif action in _OF_TABLE:
            table = second
        elif action == apsw.SQLITE_PRAGMA and first == "writable_schema" and second is not None:
            refused("sqlite_master")
            return apsw.SQLITE_DENY
        else:
            if action == apsw.SQLITE_TRANSACTION and first != "BEGIN":
                refuse_end(first)
            table = None
        if table is None or table.lower() not in tables:
            return apsw.SQLITE_OK
        refused(table.lower())
        return apsw.SQLITE_DENY

    raw.set_authorizer(judge)
    try:
        yield
    finally:
        raw.set_authorizer(None)
