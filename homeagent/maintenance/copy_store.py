"""A whole store, copied into an empty one of any engine: rows as they are stored, in one transaction, compared.

Values are never decoded: instants travel as milliseconds and JSON as its text, so that what arrives is what was stored.
Pages go by primary key, which both engines order by bytes; that bounds the memory, and lets the two sides be compared
row by row.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import bindparam, column, delete, func, select, text, tuple_
from sqlalchemy import table as sql_table

from homeagent.engine.engine import Engine
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.statements import Row, Statement
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    InvalidArgumentError,
    SchemaOutdatedError,
    SchemaTooNewError,
    SourceChangedError,
    TargetNotEmptyError,
)
from homeagent.migrations import REVISION, revision_of
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.models import DATA_TABLES, metadata
from homeagent.models.types import FlagColumn, JsonColumn, naming_column
from homeagent.unit_of_work import UnitOfWork

__all__ = ["CopyProgress", "CopyReport", "copy_store"]

PAGE = 1000
"""How many rows are held at once of each side."""

PAGE_WITH_JSON = 100
"""The same where a row may hold JSON, of up to 256 KiB."""


class CopyReport(BaseModel):
    """What was copied and then found to be the same on both sides.

    Attributes:
        rows: how many rows of each table.
    """

    model_config = ConfigDict(frozen=True)

    rows: dict[str, int]


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far a copy has come.

    Attributes:
        step: `copying`, then `comparing`.
        table: the table at hand.
        rows: how many rows of all tables this step has done.
        total: how many it will do.
    """

    step: Literal["copying", "comparing"]
    table: str
    rows: int
    total: int


Report = Callable[[CopyProgress], object]


# The tables, without the models' types


class _Table:
    """One of our tables, whose values are taken and given as they are stored."""

    def __init__(self, name: str) -> None:
        described: Any = metadata.tables[name]
        self.name = name
        self.columns = tuple(c.name for c in described.columns)
        self.page = PAGE_WITH_JSON if any(isinstance(c.type, JsonColumn) for c in described.columns) else PAGE
        self._kinds = [
            {_stored_kind(c.type), type(None)} if c.nullable else {_stored_kind(c.type)} for c in described.columns
        ]
        self._flags = [at for at, c in enumerate(described.columns) if isinstance(c.type, FlagColumn)]
        self._named = self.columns.index(naming_column(described))
        self._sound: set[tuple[type, ...]] = set()
        raw = sql_table(name, *map(column, self.columns))
        key = [raw.c[c.name] for c in described.primary_key.columns]
        self._key = {f"after_{c.name}": self.columns.index(c.name) for c in key}
        place: list[Any] = [bindparam(name) for name in self._key]
        rows = select(*raw.c).order_by(*key).limit(bindparam("limit"))
        self._first = Statement[Row](rows)
        self._next = Statement[Row](
            rows.where(tuple_(*key) > tuple_(*place)) if len(key) > 1 else rows.where(key[0] > place[0])
        )
        self._any = Statement[int](select(column("1", is_literal=True)).select_from(raw).limit(1))
        self._count = Statement[int](select(func.count()).select_from(raw))
        self._clear = Statement[Any](delete(raw))

    def pages(self, unit: UnitOfWork) -> Iterator[list[Row]]:
        """Yield all rows in the order of the primary key, a page at a time."""
        rows = unit.all(self._first, limit=self.page)
        while rows:
            yield rows
            if len(rows) < self.page:
                return
            last = rows[-1]
            rows = unit.all(self._next, limit=self.page, **{name: last[at] for name, at in self._key.items()})

    def holds_any(self, unit: UnitOfWork) -> bool:
        """Tell whether there is a row."""
        return unit.one(self._any) is not None

    def count(self, unit: UnitOfWork) -> int:
        """Return the number of rows."""
        return unit.one(self._count) or 0

    def clear(self, unit: UnitOfWork) -> None:
        """Remove all rows."""
        unit.write(self._clear)

    def insert(self, unit: UnitOfWork, rows: Sequence[Row]) -> None:
        """Insert a page."""
        for row in rows:
            kinds = tuple(map(type, row))
            if kinds not in self._sound:
                self._check_kinds(kinds, row)
            for name, value in zip(self.columns, row, strict=True):
                if value.__class__ is str and "\0" in value:
                    raise self._unsound(row, name, "text with a NUL")
            for at in self._flags:
                if row[at] not in (0, 1):
                    raise self._unsound(row, self.columns[at], "a number that is neither 0 nor 1")
        unit.insert_rows(self.name, self.columns, rows)

    def _check_kinds(self, kinds: tuple[type, ...], row: Row) -> None:
        # A column of SQLite takes any kind of value, and PostgreSQL's driver would write some of them as text.
        for name, kind, allowed in zip(self.columns, kinds, self._kinds, strict=True):
            if kind not in allowed:
                raise self._unsound(row, name, f"a value of type {kind.__name__}")
        self._sound.add(kinds)

    def _unsound(self, row: Row, name: str, what: str) -> CorruptDatabaseError:
        return CorruptDatabaseError(
            f"{self.name}.{name} of the source holds {what}, which homeagent never stores, in the row with "
            f"{self.columns[self._named]} {row[self._named]!r}: "
            "correct or delete that row, then copy again; the target is as it was"
        )


def _stored_kind(of_column: Any) -> type:
    # Ours are decorators around the type that is stored.
    kind: type = getattr(of_column, "impl_instance", of_column).python_type
    return kind


@cache
def _tables() -> tuple[_Table, ...]:
    # In an order in which no row refers to one that is still to come.
    return tuple(_Table(described.name) for described in metadata.sorted_tables)


# The copy


def copy_store(
    engines: tuple[Engine, Engine],
    open_source: Callable[[], UnitOfWork],
    open_target: Callable[[], UnitOfWork],
    *,
    live: bool,
    progress: Report | None,
) -> CopyReport:
    """Copy every row of one store into another one, which is empty, and compare them before it commits.

    Args:
        engines: the source's and the target's.
        open_source: opens a read-only unit.
        open_target: opens a write unit.
        live: whether the source may change meanwhile; then the target gets what it held at the beginning.
        progress: called after each page of rows.

    Raises:
        InvalidArgumentError: the two are one database.
        SchemaOutdatedError, SchemaTooNewError: one is not at the revision of this package.
        SchemaChangedError: the schema of one was changed by hand.
        TargetNotEmptyError: the target holds data.
        SourceChangedError: the source was written while it was copied.
        CorruptDatabaseError: the source holds what no store writes, or another target gave back other rows.
        DatabaseError: the target doesn't give back what it was given.
    """
    with open_target() as target, open_source() as source:
        for unit, location in ((source, "the source"), (target, "the target")):
            _require_present_schema(unit)
            refuse_changed_schema(unit.session.connection(), REVISION, location)
        _refuse_same_database(engines, source, target)
        _keep_writers_out(engines[1], target)
        for table in _tables():
            if table.name in DATA_TABLES and table.holds_any(target):
                raise TargetNotEmptyError(table.name)
        rows = {table.name: table.count(source) for table in _tables()}
        _copy(source, target, _Steps("copying", sum(rows.values()), progress))
        _tell_planner(engines[1], target)
        steps = _Steps("comparing", sum(rows.values()), progress)
        if live:
            differing = _first_difference(source, target, steps)
        else:
            # Against what the source holds by now: what was written since it was read would be missing.
            with open_source() as later:
                differing = _first_difference(later, target, steps)
            if differing is not None and _first_difference(source, target) is None:
                raise SourceChangedError(differing)
        if differing is not None:
            raise DatabaseError(
                f"{differing} is not the same on both sides, so nothing was copied: check the target's server or disk"
            )
    return CopyReport(rows={name: rows[name] for name in DATA_TABLES})


class _Steps:
    """Counts the rows of one step, and reports them."""

    def __init__(self, step: Literal["copying", "comparing"], total: int, report: Report | None) -> None:
        self._step: Literal["copying", "comparing"] = step
        self._total = total
        self._report = report
        self._rows = 0

    def did(self, table: str, rows: int) -> None:
        """Add rows of a table."""
        self._rows += rows
        if self._report is not None:
            self._report(CopyProgress(self._step, table, self._rows, self._total))


def _copy(source: UnitOfWork, target: UnitOfWork, steps: _Steps) -> None:
    for table in _tables():
        if table.name not in DATA_TABLES:
            # What the schema itself put in is replaced: the epoch of the source is the one that goes on.
            table.clear(target)
        for page in table.pages(source):
            table.insert(target, page)
            steps.did(table.name, len(page))


def _first_difference(source: UnitOfWork, target: UnitOfWork, steps: _Steps | None = None) -> str | None:
    """Return the name of the first table whose rows differ; None where all are the same."""
    for table in _tables():
        for ours, theirs in zip_longest(table.pages(source), table.pages(target)):
            if ours != theirs:
                return table.name
            if steps is not None:
                steps.did(table.name, len(ours))
    return None


# What must hold before


def _require_present_schema(unit: UnitOfWork) -> None:
    revision = revision_of(unit.session.connection())
    # A newer one that this version can work with may have columns that would be left behind.
    if revision is not None and revision > REVISION:
        raise SchemaTooNewError(revision, known=REVISION)
    if revision != REVISION:
        raise SchemaOutdatedError(revision, needed=REVISION)


def _refuse_same_database(engines: tuple[Engine, Engine], source: UnitOfWork, target: UnitOfWork) -> None:
    one, other = engines
    if isinstance(one, SQLiteEngine) and isinstance(other, SQLiteEngine):
        same = one.path.samefile(other.path)
    elif isinstance(one, SQLiteEngine) or isinstance(other, SQLiteEngine):
        same = False
    else:
        same = _same_schema(source, target)
    if same:
        raise InvalidArgumentError("source and target are the same database: name another target")


def _same_schema(source: UnitOfWork, target: UnitOfWork) -> bool:
    # One server has many names, and an address may lead to many. An advisory lock is one in a database:
    # https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
    key = secrets.randbits(63)
    asked = text("SELECT pg_try_advisory_xact_lock(:key), current_schema()")
    _, theirs = target.session.connection().execute(asked, {"key": key}).one()
    free, ours = source.session.connection().execute(asked, {"key": key}).one()
    return not free and ours == theirs


def _keep_writers_out(engine: Engine, target: UnitOfWork) -> None:
    # A write unit of SQLite is the only writer by itself. Here others may read on, and find nothing.
    if not isinstance(engine, SQLiteEngine):
        names = ", ".join(table.name for table in _tables())
        target.session.connection().execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))


def _tell_planner(engine: Engine, target: UnitOfWork) -> None:
    # Until the server counts by itself, it plans for empty tables.
    if not isinstance(engine, SQLiteEngine):
        for table in _tables():
            target.session.connection().execute(text(f"ANALYZE {table.name}"))
