"""Rows of the report. A row has the measured operation, the baseline and the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READ = "autocommit `SELECT`"
WRITE = "`BEGIN IMMEDIATE` transaction"
ONE_BY_ONE = "one hand-written thread"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: the measured operation.
        against: the baseline.
        limit: the goal for the median ratio of homeagent to the baseline; None if the row has no goal.
        at_least: True if the ratio compares rates, which should be high; False if the ratio compares times.
    """

    name: str
    against: str
    limit: float | None = None
    at_least: bool = False

    @property
    def goal(self) -> str:
        """Return the goal as text."""
        return "" if self.limit is None else f"{'≥' if self.at_least else '≤'} {self.limit:g}"


ROWS = (
    Row("find a device by id, in a unit", READ, 2.2),
    Row("find a device by id, one call", READ, 1.5),
    Row("find an idempotency key, in a unit", READ, 2.5),
    Row("find an idempotency key, one call", READ, 1.8),
    Row("list 50 sessions of an agent, in a unit", READ, 1.5),
    Row("nonce consume", WRITE, 1.2),
    Row("nonce consume, device with 5,000 nonces", "few nonces", 1.2),
    Row("idempotency insert", WRITE, 1.3),
    Row("last seen", WRITE, 1.5),
    Row("run_once with an empty effect", "two hand-written transactions", 1.8),
    Row("database.run() with only one caller", "homeagent's `unit_of_work`", 1.1),
    Row("durable commits of 256 asyncio callers", ONE_BY_ONE, 3.0, at_least=True),
    Row("durable commits of 64 threads", ONE_BY_ONE, 1.8, at_least=True),
    Row("p99 of a write among 8 writing processes", "hand-written SQL", 3.0),
    Row("p99 of a write during a sweep", "without a sweep", 25.0),
    Row("open a database with a WAL of 16 MB, after kill -9", "`sqlite3`", 1.5),
    Row("import homeagent and open", "`import sqlmodel`", 1.4),
    Row("events of the trace per second", "hand-written SQL", at_least=True),
    Row("PostgreSQL: find a device by id, in a unit", "psycopg transaction", 1.3),
    Row("PostgreSQL: find a device by id, one call", "psycopg's autocommit `SELECT`", 1.3),
    Row("PostgreSQL: nonce consume", "psycopg transaction", 1.3),
    Row("PostgreSQL: idempotency insert", "psycopg transaction", 1.3),
)


@dataclass(frozen=True)
class Figure:
    """The measured values of one contender in one row.

    Attributes:
        row: the name of the row.
        durability: `full` or `normal`; empty if the operation commits no change.
        contender: the name of the contender.
        value: the median of the samples, in seconds, or as a rate per second if the row compares rates.
        median: the median of the ratios to the baseline. Each ratio compares two samples of the same round.
        least: the smallest of these ratios.
        greatest: the greatest of these ratios.
    """

    row: str
    durability: str
    contender: str
    value: float
    median: float
    least: float
    greatest: float

    @property
    def ratio(self) -> str:
        """Return the ratio as text."""
        return f"{self.median:.2f} [{self.least:.2f}–{self.greatest:.2f}]"


@dataclass(frozen=True)
class Verdict:
    """Result for a goal: whether the goal was met at every durability. `met` is None if the row was not measured."""

    row: Row
    figures: Sequence[Figure]
    met: bool | None

    @property
    def text(self) -> str:
        """Return the verdict as text."""
        return "not measured" if self.met is None else "met" if self.met else "**not met**"


def judge(figures: Sequence[Figure]) -> list[Verdict]:
    """Return the verdict on each row that has a goal."""
    verdicts = []
    for row in ROWS:
        if row.limit is None:
            continue
        found = [each for each in figures if each.row == row.name and each.contender == "homeagent"]
        kept = [each.median >= row.limit if row.at_least else each.median <= row.limit for each in found]
        verdicts.append(Verdict(row, found, all(kept) if kept else None))
    return verdicts
