"""The rows of the report: the measured operation, the baseline and the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ROWS", "Figure", "Row", "Verdict", "judge"]

READ = "autocommit `SELECT`"
WRITE = "`BEGIN IMMEDIATE`, one statement, `COMMIT`"
ONE_BY_ONE = "one caller that commits one by one by hand"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: the measured operation.
        against: the baseline.
        limit: the goal for the median ratio of homeagent to the baseline; None if the row has no goal.
        at_least: whether the ratio is of rates, where more is better, and not of times.
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
    Row("device by id, in a unit", READ, 2.2),
    Row("device by id, one call", READ, 1.5),
    Row("idempotency find, in a unit", READ, 2.5),
    Row("idempotency find, one call", READ, 1.8),
    Row("50 sessions of an agent, in a unit", READ, 1.5),
    Row("nonce consume", WRITE, 1.2),
    Row("nonce consume, a device with 5,000", "homeagent, a device with few nonces", 1.2),
    Row("idempotency insert", WRITE, 1.3),
    Row("last seen", WRITE, 1.5),
    Row("run_once of an empty effect", "two hand-written transactions", 1.8),
    Row("a lone caller through run", "homeagent, `unit_of_work`", 1.1),
    Row("durable commits of 256 asyncio callers", ONE_BY_ONE, 3.0, at_least=True),
    Row("durable commits of 64 threads", ONE_BY_ONE, 1.8, at_least=True),
    Row("p99 of a write among 8 processes", "`BEGIN IMMEDIATE`, tried again after a random 1 to 5 ms", 3.0),
    Row("p99 of a writer during a sweep", "homeagent, the same writer alone", 25.0),
    Row("open after kill -9, WAL of 16 MB", "`sqlite3`: open, `SELECT count(*)`, close", 1.5),
    Row("import and open", "`import sqlmodel`", 1.4),
    Row("the trace, events a second", "the same messages by hand", at_least=True),
    Row("PostgreSQL: device by id, in a unit", "psycopg: `BEGIN`, `SELECT`, `COMMIT`", 1.3),
    Row("PostgreSQL: device by id, one call", "psycopg: autocommit `SELECT`", 1.3),
    Row("PostgreSQL: nonce consume", "psycopg: `BEGIN`, one statement, `COMMIT`", 1.3),
    Row("PostgreSQL: idempotency insert", "psycopg: `BEGIN`, one statement, `COMMIT`", 1.3),
)


@dataclass(frozen=True)
class Figure:
    """The measured values of one contender in one row.

    Attributes:
        row: the name of the row.
        durability: `full`, `normal`, or empty if no change is committed.
        contender: the name of the contender.
        value: the median of the samples: seconds, or a rate per second if the row is of rates.
        median: the median ratio to the baseline, of samples from the same round.
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
    """Whether a goal was met at every durability; `met` is None if the row was not measured."""

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
