"""Find, copy and compare the tables of two stores.

SQLAlchemy's types convert the application's values between SQLite and PostgreSQL. The comparison finds rows by key,
because engines can sort texts differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Dialect,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    cast,
    func,
    inspect,
    or_,
    select,
    text,
    tuple_,
)
from sqlmodel import AutoString

from homeagent.engine.engine import Engine
from homeagent.errors import (
    ConflictError,
    CorruptDatabaseError,
    DatabaseError,
    HomeAgentError,
    InvalidArgumentError,
    SchemaChangedError,
)
from homeagent.migrations.rehearsal import kept_objects
from homeagent.migrations.revisions import (
    REVISION,
    broken_references,
    count_rows,
    own_tables,
    reason_of,
    server_triggers,
    stored_revisions,
)
from homeagent.migrations.schema_drift import homeagents_objects
from homeagent.models import APPLICATION_VERSION_TABLE, SCHEMA, DeviceChange, metadata
from homeagent.models.types import (
    EnumColumn,
    FlagColumn,
    JsonColumn,
    TimestampColumn,
    naming_column,
    problem_of_stored,
    unreadable,
)
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from sqlalchemy import Connection

PAGE = 1000
"""Number of rows in a page. Only one page of each store is in memory."""

PAGE_WITH_JSON = 25
"""Number of rows in a page of a table with JSON. The JSON of one row has up to 1 MiB."""

# Column types that store the same values on SQLite and PostgreSQL. Copy such values without decoding.
_STORED_ALIKE = (AutoString, EnumColumn, FlagColumn, JsonColumn, TimestampColumn)

_Row = tuple[Any, ...]

Progress = Callable[[str, int], object]
"""Function that gets a table's name and the number of processed rows."""


class _JsonText(TypeDecorator[str]):
    """JSON that is read as text. Decoding would lose digits, and would confuse NULL with JSON's null."""

    impl = Text
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return cast(column, Text)


class _ZonedTime(TypeDecorator[datetime]):
    """A time with a time zone. SQLAlchemy stores no zone in SQLite. A time without a zone counts as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


_parsed = partial(json.loads, parse_float=Decimal)


@dataclass(frozen=True)
class CopiedTable:
    """A table that exists in the source and in the target. A table of the application has `model=None`."""

    name: str
    source: Table
    target: Table
    model: Table | None

    @property
    def _page(self) -> int:
        has_json = self.model is not None and any(isinstance(column.type, JsonColumn) for column in self.model.columns)
        return PAGE_WITH_JSON if has_json else PAGE

    def count(self, connection: Connection) -> int:
        """Return the number of rows."""
        return count_rows(connection, [self.name])[self.name]

    def pages(self, connection: Connection) -> Iterator[list[_Row]]:
        """Yield all rows of the source in pages."""
        return self._read(connection, select(*self.source.columns))

    def _by_key(self, rows: Iterable[_Row]) -> dict[_Row, _Row]:
        places = [number for number, column in enumerate(self.source.columns) if column.primary_key]
        return {tuple(row[place] for place in places): row for row in rows}

    def insert(self, target: UnitOfWork, page: Sequence[_Row]) -> None:
        """Insert a page of rows into the target. Raise CorruptDatabaseError for a value that no store writes."""
        if self.model is not None:
            self._check(self.model, page)
        columns = list(self.target.columns)
        dialect = target.session.connection().dialect
        try:
            binds = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]
            rows = [[bind(value) if bind else value for bind, value in zip(binds, row, strict=True)] for row in page]
            target.insert_rows(self.name, [column.name for column in columns], rows)
        except Exception as error:
            if self.model is not None:
                raise
            # A column type of the application can raise any error.
            raise _refused(self.name, error) from None

    def _check(self, model: Table, page: Sequence[_Row]) -> None:
        """Raise CorruptDatabaseError for a value that homeagent does not store."""
        # A SQLite column accepts any type. PostgreSQL's driver would write some values as text.
        names = [column.name for column in self.source.columns]
        problems = [problem_of_stored(model.columns[name]) for name in names]
        for row in page:
            for name, problem, value in zip(names, problems, row, strict=True):
                what = problem(value)
                if what is not None:
                    raise unreadable(model, name, row[names.index(naming_column(model))], what)

    def differs(self, source: Connection, target: Connection, progress: Progress) -> bool:
        """Return True if the two databases have different rows. Report the progress after each page without a
        difference.
        """
        if self.count(source) != self.count(target):
            return True
        for page in self.pages(source):
            if not self._is_copied(page, target):
                return True
            progress(self.name, len(page))
        return False

    def _is_copied(self, page: list[_Row], target: Connection) -> bool:
        wanted, columns = self._by_key(page), zip(self.source.columns, self.target.columns, strict=True)
        # In the target, an application's table can have another primary key.
        key = [other for column, other in columns if column.primary_key]
        chosen = tuple_(*key).in_(wanted) if len(key) > 1 else key[0].in_([one for (one,) in wanted])
        copied = self._by_key(chain.from_iterable(self._read(target, select(*self.target.columns).where(chosen))))
        return all(self._is_same(row, copied.get(one)) for one, row in wanted.items())

    def _is_same(self, row: _Row, other: _Row | None) -> bool:
        # Also compare the rows as texts, because NaN differs from NaN.
        if other is None or other == row or repr(other) == repr(row):
            return other is not None
        # Compare parsed JSON: the engines can store one value as different texts.
        return all(
            one == two
            or (isinstance(column.type, _JsonText) and None not in (one, two) and _parsed(one) == _parsed(two))
            for column, one, two in zip(self.source.columns, row, other, strict=True)
        )

    def _read(self, connection: Connection, rows: Any) -> Iterator[list[_Row]]:
        """Run a SELECT statement, and yield the rows in pages. Raise CorruptDatabaseError if a row can't be read."""
        try:
            with connection.execute(rows, execution_options={"yield_per": self._page}) as found:
                for page in found.partitions():
                    yield [tuple(row) for row in page]
        except HomeAgentError:
            raise
        except Exception as error:  # noqa: BLE001  a column type of the application can raise any error
            raise CorruptDatabaseError(
                f"a row of {self.name} can't be read ({type(error).__name__}), so the copy was undone: correct the "
                f"row, or leave the table (leave={[self.name]!r})"
            ) from None

    def continue_numbers(self, source: Connection, target: Connection) -> None:
        """Set the target's next automatic key above all keys of the source. Include the keys of deleted rows."""
        last = self._last_number(source)
        if target.dialect.name == "sqlite":
            # SQLite ignores the number of a table without AUTOINCREMENT.
            if last:
                target.execute(_FORGET, {"table": self.name})
                target.execute(_REMEMBER, {"table": self.name, "last": last})
            return
        for names in self._numbered(target):
            highest = max(last, target.execute(select(func.max(self.target.c[names["name"]]))).scalar() or 0)
            if highest > 0:
                target.execute(_SET_VALUE, {**names, "last": highest})

    def _last_number(self, source: Connection) -> int:
        if source.dialect.name == "sqlite":
            return int(source.execute(_SEQUENCE, {"table": self.name}).scalar() or 0)
        return max(
            (int(source.execute(_LAST_VALUE, names).scalar() or 0) for names in self._numbered(source)), default=0
        )

    def _numbered(self, connection: Connection) -> Iterator[dict[str, str]]:
        """Yield the names of the table and the column for each integer key column."""
        table = connection.dialect.identifier_preparer.quote(self.name)
        for column in self.target.primary_key.columns:
            if isinstance(column.type, Integer):
                yield {"table": table, "name": column.name}


# The table `sqlite_sequence` exists, because homeagent's table `device_changes` has AUTOINCREMENT.
_SEQUENCE = text("SELECT seq FROM sqlite_sequence WHERE name = :table")
_FORGET = text("DELETE FROM sqlite_sequence WHERE name = :table")
_REMEMBER = text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last)")
_LAST_VALUE = text("SELECT pg_sequence_last_value(CAST(pg_get_serial_sequence(:table, :name) AS regclass))")
_SET_VALUE = text("SELECT setval(s, :last) FROM pg_get_serial_sequence(:table, :name) AS s WHERE s IS NOT NULL")


def homeagents_tables(source: Connection, target: Connection) -> list[CopiedTable]:
    """Return homeagent's tables in the order of their foreign keys. Omit the feed of device changes: the target's
    triggers fill the feed. Raise SchemaChangedError if a table has other columns than its model.
    """
    models = [model for model in SCHEMA if model is not DeviceChange.__table__]
    for connection, location in ((source, "the source"), (target, "the target")):
        changes = [change for model in models for change in _changed_columns(model, connection)]
        if changes:
            raise SchemaChangedError(changes, location=location, command=None)
    return [
        CopiedTable(model.name, _described(model.name, source, None), _described(model.name, target, None), model)
        for model in models
    ]


def _changed_columns(model: Table, connection: Connection) -> list[str]:
    """Return a text for each missing and each unknown column of one of homeagent's tables."""
    if not inspect(connection).has_table(model.name):
        return [f"table {model.name} is missing"]
    found, wanted = _described(model.name, connection, None).columns.keys(), model.columns.keys()
    return [
        *(f"column {model.name}.{name} is missing" for name in wanted if name not in found),
        *(f"column {model.name}.{name} is not homeagent's" for name in found if name not in wanted),
    ]


def applications_tables(
    engines: tuple[Engine, Engine], source: Connection, target: Connection, leave: Collection[str]
) -> list[CopiedTable]:
    """Return the application's tables in the order of their foreign keys. Omit tables whose names are in `leave=`."""
    found = set(own_tables(source))
    wrong = sorted(set(leave) - found)
    if wrong:
        raise InvalidArgumentError(f"leave names a table that the source does not have: {', '.join(wrong)}")
    names = found - set(leave)
    lacking = sorted(names - set(own_tables(target)))
    if lacking:
        raise InvalidArgumentError(
            f"the source holds tables of an application that the target does not have: {', '.join(lacking)}. Create "
            "the tables in the target by the application's revisions (Database.open(migrations=…), or "
            f"--migrations), or leave the tables behind (leave={lacking!r}, or --leave)"
        )
    if not names:
        return []
    revisions = [", ".join(sorted(stored_revisions(one, APPLICATION_VERSION_TABLE))) for one in (source, target)]
    if revisions[0] != revisions[1]:
        raise InvalidArgumentError(
            f"the application's tables are at revision {revisions[0] or None!r} in the source and at "
            f"{revisions[1] or None!r} in the target: open both databases with the same migrations=…"
        )
    declared = {
        table.name: table
        for one in (metadata, *engines[0].application_metadata, *engines[1].application_metadata)
        for table in one.tables.values()
    }
    broken = broken_references(source) if source.dialect.name == "sqlite" else {}
    orphans = sorted(keys for keys in broken if keys[0] in names)
    if orphans:
        shown = ", ".join(f"{child} to {parent}" for child, parent in orphans)
        raise DatabaseError(
            f"rows of the application's tables refer to rows that do not exist ({shown}), and the target would refuse "
            "the rows: correct or delete the rows ('PRAGMA foreign_key_check' lists them), or leave the tables"
        )
    if target.dialect.name == "sqlite":
        # Let COMMIT check the foreign keys. A row can refer to a later row.
        target.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
    # SQLAlchemy's order ignores circular foreign keys, which `suspended_rules()` defers.
    order = [str(name) for name, _ in inspect(target).get_sorted_table_and_fkc_names() if name in names]
    return [_own_table(name, source, target, declared.get(name)) for name in order]


# Statements for the application's triggers that run in an ordinary session, and for its foreign keys that can't be
# deferred. Only the owner of a table can run the statements. The second column restores the first column's change.
_SUSPENDED = text(
    "WITH copied AS (SELECT * FROM pg_class WHERE pg_has_role(relowner, 'USAGE')"
    " AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()))"
    " SELECT format('ALTER TABLE %I DISABLE TRIGGER %I', c.relname, t.tgname), format('ALTER TABLE %I %s TRIGGER %I',"
    " c.relname, CASE t.tgenabled WHEN 'A' THEN 'ENABLE ALWAYS' ELSE 'ENABLE' END, t.tgname)"
    " FROM pg_trigger t JOIN copied c ON c.oid = t.tgrelid"
    " WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgname <> ALL (CAST(:homeagents AS text[]))"
    " AND c.relname = ANY (CAST(:tables AS text[]))"
    " UNION ALL SELECT format('ALTER TABLE %I ALTER CONSTRAINT %I DEFERRABLE', c.relname, k.conname),"
    " format('ALTER TABLE %I ALTER CONSTRAINT %I NOT DEFERRABLE', c.relname, k.conname)"
    " FROM pg_constraint k JOIN copied c ON c.oid = k.conrelid"
    " WHERE k.contype = 'f' AND NOT k.condeferrable AND k.conparentid = 0"
    " AND c.relname = ANY (CAST(:own AS text[]))"
)


@contextmanager
def suspended_rules(connection: Connection, tables: Sequence[CopiedTable]) -> Iterator[None]:
    """In the block, do not run the application's triggers. The source has the rows that the triggers wrote. On
    PostgreSQL, check the foreign keys of the application's tables at the end of the block.
    """
    if connection.dialect.name == "sqlite":
        with kept_objects(connection, REVISION):
            # A trigger that fills a virtual table must run, because a copy contains no virtual tables.
            dropped = connection.exec_driver_sql(
                "SELECT name FROM sqlite_master AS dropped WHERE type = 'trigger' AND NOT EXISTS (SELECT 1 FROM"
                " sqlite_master AS filled WHERE filled.sql LIKE 'CREATE VIRTUAL TABLE%'"
                " AND instr(lower(dropped.sql), lower(filled.name)))"
            ).scalars()
            quote = connection.dialect.identifier_preparer.quote
            for name in set(dropped) - homeagents_objects(REVISION):
                connection.exec_driver_sql(f"DROP TRIGGER {quote(name)}")
            yield
        # SQLite's error at COMMIT would not name the table.
        for child, parent in sorted(broken_references(connection)):
            if child in {table.name for table in tables}:
                raise _refused(child, ConflictError(f"rows of {parent} are missing"))
        return
    names = {
        "tables": [table.name for table in tables],
        "own": [table.name for table in tables if table.model is None],
        "homeagents": list(server_triggers(REVISION)),
    }
    changes = connection.execute(_SUSPENDED, names).all()
    for suspend, _ in changes:
        connection.execute(text(suspend))
    connection.execute(text("SET CONSTRAINTS ALL DEFERRED"))
    yield
    # Also run the feed's deferred trigger now. ALTER TABLE fails if a deferred trigger has not run yet.
    try:
        connection.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    except ConflictError as error:
        raise _refused(str(error.table), error) from None
    for _, restore in changes:
        connection.execute(text(restore))


def _refused(table: str, error: Exception) -> DatabaseError:
    """Return the error for a table whose rows the target refuses."""
    return DatabaseError(
        f"the target refuses rows of {table} ({reason_of(error)}), so the copy was undone: correct the rows in the "
        f"source, or leave the table (leave={[table]!r})"
    )


def _own_table(name: str, source: Connection, target: Connection, declared: Table | None) -> CopiedTable:
    sides = (_described(name, source, declared), _described(name, target, declared))
    columns = [{column.name for column in side.columns} for side in sides]
    # SQLite accepts NULL in most primary keys.
    is_null = or_(False, *(column.is_(None) for column in sides[0].primary_key.columns))
    if columns[0] != columns[1]:
        shown = ", ".join(sorted(columns[0] ^ columns[1]))
        problem = f"has other columns in the target than in the source ({shown}): upgrade the tables on both sides"
    elif not sides[0].primary_key.columns:
        problem = "has no primary key, so its rows can't be compared: add a primary key"
    elif source.execute(select(1).select_from(sides[0]).where(is_null).limit(1)).first() is not None:
        problem = "has a row whose primary key is NULL: correct or delete the row"
    else:
        return CopiedTable(name, *sides, None)
    raise InvalidArgumentError(f"the table {name} {problem}, or leave the table (leave={[name]!r}, or --leave)")


def _described(name: str, connection: Connection, declared: Table | None) -> Table:
    """Return a Table object with the writable columns, sorted by name."""
    inspector = inspect(connection)
    key = inspector.get_pk_constraint(name)["constrained_columns"]
    columns = []
    for found in sorted(inspector.get_columns(name), key=lambda found: found["name"]):
        if "computed" in found:
            continue
        known = None if declared is None else declared.columns.get(found["name"])
        kind: Any = found["type"] if known is None or isinstance(known.type, _STORED_ALIKE) else known.type
        if isinstance(kind, JSON) or isinstance(found["type"], JSON):
            kind = _JsonText()
        elif isinstance(kind, DateTime) and kind.timezone:
            kind = _ZonedTime()
        columns.append(Column(found["name"], kind, primary_key=found["name"] in key))
    return Table(name, MetaData(), *columns)
