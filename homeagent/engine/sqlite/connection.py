"""A link to a SQLite file."""

from __future__ import annotations

from typing import Any

from homeagent.engine.connection import StoreConnection
from homeagent.engine.sqlite.dialect import StatementCursor

__all__ = ["SQLiteConnection"]


class SQLiteConnection(StoreConnection):
    """A connection of apsw's. Its statements run on a cursor without the parts of DB-API that only SQLAlchemy needs."""

    __slots__ = ()

    @staticmethod
    def _open_cursor(raw: Any) -> StatementCursor:
        return StatementCursor(raw)

    def _send_commit(self) -> None:
        self._raw.commit_by(self._execute)
