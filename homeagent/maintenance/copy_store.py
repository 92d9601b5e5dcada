"""Copy a whole store into an empty store of any engine in one transaction, and compare the two stores.

Stored values are copied without decoding. For example, a timestamp stays a number of milliseconds, and JSON stays text.
The copy reads rows in pages by primary key, which limits the memory. Both engines order the keys by bytes, so the two
stores can be compared row by row.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Connection, bindparam, column, delete, func, select, text, tuple_
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
from homeagent.maintenance.own_tables import OwnTable, late_references, plan_own_tables
from homeagent.migrations import REVISION, revision_of
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.models import DATA_TABLES, SCHEMA, DeviceChange
from homeagent.models.types import FlagColumn, JsonColumn, naming_column, stored_type
from homeagent.unit_of_work import UnitOfWork

PAGE = 1000
"""Number of rows that a page has. Only one page of each store is in memory."""

PAGE_WITH_JSON = 25
"""Number of rows that a page of a table with JSON has. The JSON of one row has up to 1 MiB."""


class CopyReport(BaseModel, frozen=True):
    """Result of a copy that was compared with its source.

    Attributes:
        rows: number of copied rows by table name, including the application's tables.
        left: names of the application's tables that were not copied.
    """

    rows: dict[str, int]
    left: list[str] = []


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """Progress of a copy.

    Attributes:
        step: the text "copying" in the first step, or "comparing" in the second step.
        table: name of the current table.
        rows: number of rows that the current step has processed, in all tables.
        total: total number of rows of the current step.
    """

    step: Literal["copying", "comparing"]
    table: str
    rows: int
    total: int


Report = Callable[[CopyProgress], object]


# Read and write tables as stored values, without the models' types


class _Table:
    """A table of homeagent. The methods of this class read and write stored values, without the models' types."""

    def __init__(self, described: Any) -> None:
        self.name: str = described.name
        self.columns = tuple(c.name for c in described.columns)
        self.page = PAGE_WITH_JSON if any(isinstance(c.type, JsonColumn) for c in described.columns) else PAGE
        self._kinds = [{stored_type(c), type(None)} if c.nullable else {stored_type(c)} for c in described.columns]
        self._flags = [at for at, c in enumerate(described.columns) if isinstance(c.type, FlagColumn)]
        self._named = self.columns.index(naming_column(described))
        self._sound: set[tuple[type, ...]] = set()
        raw = sql_table(self.name, *map(column, self.columns))
        key = [raw.c[c.name] for c in described.primary_key.columns]
        self._key = {f"after_{c.name}": self.columns.index(c.name) for c in key}
        place: list[Any] = [bindparam(name) for name in self._key]
        rows = select(*raw.c).order_by(*key).limit(bindparam("limit"))
        self._first = Statement[Row](rows)
        self._next = Statement[Row](
            rows.where(tuple_(*key) > tuple_(*place)) if len(key) > 1 else rows.where(key[0] > place[0])
        )
        self._any: Statement[int] = Statement(select(column("1", is_literal=True)).select_from(raw).limit(1))
        self._count = Statement[int](select(func.count()).select_from(raw))
        self._clear = Statement[Any](delete(raw))

    def pages(self, unit: UnitOfWork) -> Iterator[list[Row]]:
        """Yield all rows in pages, in the order of the primary key."""
        rows = unit.all(self._first, limit=self.page)
        while rows:
            yield rows
            if len(rows) < self.page:
                return
            last = rows[-1]
            rows = unit.all(self._next, limit=self.page, **{name: last[at] for name, at in self._key.items()})

    def holds_any(self, unit: UnitOfWork) -> bool:
        """Return True if the table has a row."""
        return unit.one(self._any) is not None

    def count(self, unit: UnitOfWork) -> int:
        """Return the number of rows."""
        return unit.one(self._count) or 0

    def clear(self, unit: UnitOfWork) -> None:
        """Remove all rows."""
        unit.write(self._clear)

    def insert(self, unit: UnitOfWork, rows: Sequence[Row]) -> None:
        """Insert a page of rows. Raise CorruptDatabaseError for a value that homeagent's stores do not write."""
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
        # A column of SQLite accepts values of any type, and psycopg would write some of these values as text.
        for name, kind, allowed in zip(self.columns, kinds, self._kinds, strict=True):
            if kind not in allowed:
                raise self._unsound(row, name, f"a value of type {kind.__name__}")
        self._sound.add(kinds)

    def _unsound(self, row: Row, name: str, what: str) -> CorruptDatabaseError:
        return CorruptDatabaseError(
            f"{self.name}.{name} of the source holds {what}, which homeagent never stores, in the row with "
            f"{self.columns[self._named]} {row[self._named]!r}: "
            "correct or delete the row, then copy again. The target is unchanged"
        )


@cache
def _tables() -> tuple[_Table, ...]:
    # Do not copy the feed of device changes, because the target's triggers add a change for each copied device. When
    # the row of the table `store` is copied, the feed of device changes starts again.
    return tuple(_Table(table) for table in SCHEMA if table is not DeviceChange.__table__)


# The copy


def copy_store(
    engines: tuple[Engine, Engine],
    open_source: Callable[[], AbstractContextManager[UnitOfWork]],
    open_target: Callable[[], AbstractContextManager[UnitOfWork]],
    *,
    live: bool,
    leave: Collection[str] = (),
    progress: Report | None,
) -> CopyReport:
    """Copy all rows of a store into an empty store, and compare both stores before the commit.

    `engines=(source, target)` contains the two engines. With `live=True`, other units can change the source during the
    copy. The copy contains the state of the source at the time when the copy began. `leave=[…]` names the application's
    tables that are not copied. After each page of rows, the copy calls the function `progress()`.

    Raises:
        InvalidArgumentError: if source and target are the same database, or the target lacks a table of the
            application.
        SchemaOutdatedError, SchemaTooNewError: if the source or the target is not at this version's revision.
        SchemaChangedError: if the schema of the source or the target was changed by hand.
        TargetNotEmptyError: if the target has rows.
        SourceChangedError: if the source changed during the copy. With `live=True` the copy accepts changes of the
            source.
        CorruptDatabaseError: if the source has a value that homeagent's stores do not write.
        DatabaseError: if the rows read back from the target differ from the copied rows.
    """
    with open_target() as target, open_source() as source:
        for unit, location in ((source, "the source"), (target, "the target")):
            _require_present_schema(unit)
            acknowledged = engines[0].acknowledged | engines[1].acknowledged
            refuse_changed_schema(unit.session.connection(), REVISION, location, acknowledged)
        _refuse_same_database(engines, source, target)
        own = plan_own_tables(engines, source.session.connection(), target.session.connection(), leave)
        _keep_writers_out(engines[1], target, own)
        for table in _tables():
            if table.name in DATA_TABLES and table.holds_any(target):
                raise TargetNotEmptyError(table.name)
        rows = {table.name: table.count(source) for table in _tables()}
        rows |= {table.name: table.count(source.session.connection()) for table in own}
        _copy(source, target, own, _Steps("copying", sum(rows.values()), progress))
        _analyze(engines[1], target, own)
        steps = _Steps("comparing", sum(rows.values()), progress)
        if live:
            differing = _first_difference(source, target, own, steps)
        else:
            # Compare the target with a new snapshot of the source, to find rows that were written during the copy.
            with open_source() as later:
                differing = _first_difference(later, target, own, steps)
            if differing is not None and _first_difference(source, target, own) is None:
                raise SourceChangedError(differing)
        if differing is not None:
            raise DatabaseError(
                f"{differing} is not the same on both sides, so the copy was undone: check the target's server or disk"
            )
    copied = {name: rows[name] for name in (*DATA_TABLES, *(table.name for table in own))}
    return CopyReport(rows=copied, left=sorted(leave))


class _Steps:
    """Counter of the rows that one step has processed. The counter also reports the progress."""

    def __init__(self, step: Literal["copying", "comparing"], total: int, report: Report | None) -> None:
        self._step: Literal["copying", "comparing"] = step
        self._total = total
        self._report = report
        self._rows = 0

    def add(self, table: str, rows: int) -> None:
        """Add a number of processed rows of a table."""
        self._rows += rows
        if self._report is not None:
            self._report(CopyProgress(self._step, table, self._rows, self._total))


def _copy(source: UnitOfWork, target: UnitOfWork, own: Sequence[OwnTable], steps: _Steps) -> None:
    for table in _tables():
        if table.name not in DATA_TABLES:
            # Replace the rows that the revisions inserted in the target, so that the target continues with the epoch of
            # the source.
            table.clear(target)
        for page in table.pages(source):
            table.insert(target, page)
            steps.add(table.name, len(page))
    connection = target.session.connection()
    with late_references(connection, own):
        for own_table in own:
            for rows in own_table.pages(source.session.connection()):
                own_table.insert(connection, rows)
                steps.add(own_table.name, len(rows))
    for own_table in own:
        own_table.advance_sequence(connection, own_table.last_number(source.session.connection()))


def _first_difference(
    source: UnitOfWork, target: UnitOfWork, own: Sequence[OwnTable], steps: _Steps | None = None
) -> str | None:
    """Return the name of the first table whose rows differ. If all tables have equal rows, return None."""
    for table in _tables():
        for original, copied in zip_longest(table.pages(source), table.pages(target)):
            if original != copied:
                return str(table.name)
            if steps is not None:
                steps.add(table.name, len(copied))
    for own_table in own:
        if own_table.differs(source.session.connection(), target.session.connection()):
            return own_table.name
        if steps is not None:
            steps.add(own_table.name, own_table.count(target.session.connection()))
    return None


# Checks before the copy


def _require_present_schema(unit: UnitOfWork) -> None:
    revision = revision_of(unit.session.connection())
    # A schema of a newer version can have columns that this version of homeagent would not copy.
    if revision is not None and revision > REVISION:
        raise SchemaTooNewError(revision, known=REVISION)
    if revision != REVISION:
        raise SchemaOutdatedError(revision, needed=REVISION)


def _refuse_same_database(engines: tuple[Engine, Engine], source: UnitOfWork, target: UnitOfWork) -> None:
    first, second = engines
    if isinstance(first, SQLiteEngine) or isinstance(second, SQLiteEngine):
        same = isinstance(first, SQLiteEngine) and isinstance(second, SQLiteEngine) and first.path.samefile(second.path)
    else:
        # Do not compare URLs: a server can have several names, and a name can lead to several servers. An advisory lock
        # belongs to one database. A session of another database does not find the key locked
        # (https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS).
        key = secrets.randbits(63)
        query = text("SELECT pg_try_advisory_xact_lock(:key), current_schema()")
        _, target_schema = target.session.connection().execute(query, {"key": key}).one()
        free, source_schema = source.session.connection().execute(query, {"key": key}).one()
        same = not free and source_schema == target_schema
    if same:
        raise InvalidArgumentError("source and target are the same database: name another target")


def _keep_writers_out(engine: Engine, target: UnitOfWork, own: Sequence[OwnTable]) -> None:
    # On SQLite the write unit excludes other writers. On PostgreSQL the table lock excludes writers, but not readers.
    if not isinstance(engine, SQLiteEngine):
        connection = target.session.connection()
        connection.execute(text(f"LOCK TABLE {', '.join(_quoted(connection, own))} IN EXCLUSIVE MODE"))


def _analyze(engine: Engine, target: UnitOfWork, own: Sequence[OwnTable]) -> None:
    # Without statistics the server's planner would assume empty tables until autovacuum runs.
    if not isinstance(engine, SQLiteEngine):
        connection = target.session.connection()
        for name in _quoted(connection, own):
            connection.execute(text(f"ANALYZE {name}"))


def _quoted(connection: Connection, own: Sequence[OwnTable]) -> list[str]:
    quote = connection.dialect.identifier_preparer.quote
    return [quote(name) for name in (*(table.name for table in _tables()), *(table.name for table in own))]
