"""apsw: the hand-written contender on another driver, which brings an SQLite of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from tests.benchmarks.contender import Contender
from tests.benchmarks.contenders.handwritten import INDEX, PRAGMAS, Handwritten

__all__ = ["Apsw"]


class _Result:
    """A cursor that also tells how many rows were changed, as the interface of `sqlite3` has it."""

    __slots__ = ("connection", "cursor")

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.cursor: Any = connection.cursor()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> _Result:
        self.cursor.execute(sql, parameters)
        return self

    def fetchone(self) -> Any:
        row = self.cursor.fetchone()
        if row is not None:
            # Whatever else there is: a statement that is left half-way keeps its snapshot.
            self.cursor.fetchall()
        return row

    def fetchall(self) -> Any:
        return self.cursor.fetchall()

    @property
    def rowcount(self) -> int:
        changed: int = self.connection.changes()
        return changed


class Apsw(Handwritten):
    """One connection and constant SQL."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        Contender.__init__(self, target, durability, traced=traced)
        self.connection = apsw.Connection(target)
        self.cursor = _Result(self.connection)
        self.execute = self.cursor.execute
        for pragma in (*PRAGMAS, f"synchronous={durability}"):
            self.execute(f"PRAGMA {pragma}").fetchall()

    @classmethod
    def describe(cls) -> str:
        """Return the versions."""
        return f"{apsw.apsw_version()}, SQLite {apsw.sqlite_lib_version()}"

    def index(self, sessions: Sequence[Any]) -> int:
        """Add sessions."""
        self.execute("BEGIN IMMEDIATE")
        try:
            self.cursor.cursor.executemany(INDEX, sessions)
            self.execute("COMMIT")
        except BaseException:
            self.execute("ROLLBACK")
            raise
        return len(sessions)
