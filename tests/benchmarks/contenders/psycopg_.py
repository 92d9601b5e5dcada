"""Hand-written psycopg: what homeagent is measured against on PostgreSQL.

One connection, one cursor, the statements of the hand-written `sqlite3` in this driver's spelling, prepared as psycopg
does by itself. Transactions have the isolation that homeagent asks for.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import psycopg

from tests.benchmarks.contender import Contender
from tests.benchmarks.contenders.handwritten import Handwritten

__all__ = ["Psycopg"]

BEGINS = {
    "BEGIN": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "BEGIN IMMEDIATE": "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
}


@cache
def spelled(sql: str) -> bytes:
    """Return a statement in psycopg's spelling."""
    return BEGINS.get(sql, sql.replace("?", "%s")).encode()


class _Cursor:
    """A cursor that takes the statements of `sqlite3`."""

    def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
        self.cursor = cursor

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        return self.cursor.execute(spelled(sql), parameters) if parameters else self.cursor.execute(spelled(sql))

    def executemany(self, sql: str, parameters: Any) -> None:
        self.cursor.executemany(spelled(sql), parameters)


class Psycopg(Handwritten):
    """One connection and constant SQL."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        Contender.__init__(self, target, durability, traced=traced)
        # In autocommit mode psycopg sends no BEGIN of its own.
        self.connection = psycopg.connect(target.replace("+psycopg", ""), autocommit=True)
        self.cursor = _Cursor(self.connection.cursor())
        self.execute = self.cursor.execute

    @classmethod
    def describe(cls) -> str:
        """Return the versions."""
        return f"{version('psycopg')}, libpq {psycopg.pq.version_pretty(psycopg.pq.version())}"
