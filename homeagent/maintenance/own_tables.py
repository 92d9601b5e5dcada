"""Copy the application's own tables, and compare the copied rows with the source.

homeagent reads the structure of the tables from both databases. If a table has equal columns in both databases,
homeagent copies the table. The engines store some types differently; for example, SQLite stores a timestamp as text.
Therefore homeagent converts the values by the column types of the application's models. If a table has no model,
homeagent converts the values by the types that SQLAlchemy finds in the database.

The engines can order text keys differently. Therefore the comparison does not follow the order of the keys. The
comparison reads a page of rows from the source, and the rows with equal keys from the target.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    Column,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    cast,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
    tuple_,
)
from sqlmodel import AutoString

from homeagent.engine.engine import Engine
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    HomeAgentError,
    InvalidArgumentError,
    TargetNotEmptyError,
)
from homeagent.migrations.revisions import broken_references, own_tables, reason_of, stored_revisions
from homeagent.models import APPLICATION_VERSION_TABLE, metadata
from homeagent.models.types import EnumColumn, FlagColumn, JsonColumn, TimestampColumn

if TYPE_CHECKING:
    from sqlalchemy import Connection

PAGE = 500
"""Number of rows that a page has."""

# In columns of the following types, the stored values are equal on both engines. Therefore homeagent copies the values
# without decoding.
_STORED_ALIKE = (AutoString, EnumColumn, FlagColumn, JsonColumn, TimestampColumn)

_Row = tuple[Any, ...]


class _JsonText(TypeDecorator[str]):
    """A column type that reads JSON as text. A decoded value would not distinguish NULL from JSON's null, and would
    lose digits.

    Args:
        stored: type of the column on PostgreSQL. The value is None on SQLite, which stores JSON as text.
    """

    impl = Text
    cache_ok = True

    def __init__(self, stored: Any = None) -> None:
        super().__init__()
        self.stored = stored

    def column_expression(self, column: Any) -> Any:
        """Read the JSON column as text."""
        return cast(column, Text)

    def bind_expression(self, bindvalue: Any) -> Any:
        """Convert the JSON text to the type of the column."""
        return bindvalue if self.stored is None else cast(bindvalue, self.stored)


_parsed = partial(json.loads, parse_float=Decimal)


@dataclass(frozen=True)
class OwnTable:
    """A table of the application, with its description in the source and in the target."""

    name: str
    source: Table
    target: Table

    @property
    def _key(self) -> list[str]:
        return [column.name for column in self.source.primary_key.columns]

    def count(self, connection: Connection) -> int:
        """Return the number of rows."""
        return int(connection.execute(select(func.count()).select_from(self.source)).scalar_one())

    def pages(self, connection: Connection) -> Iterator[list[_Row]]:
        """Yield all rows of the source in pages, in the order of the primary key."""
        key = [self.source.c[name] for name in self._key]
        places = [list(self.source.c).index(column) for column in key]
        rows = select(*self.source.c).order_by(*key).limit(PAGE)
        page = self._read(connection, rows)
        while page:
            yield page
            if len(page) < PAGE:
                return
            last = [page[-1][place] for place in places]
            page = self._read(
                connection, rows.where(tuple_(*key) > tuple_(*last) if len(key) > 1 else key[0] > last[0])
            )

    def insert(self, connection: Connection, page: Sequence[_Row]) -> None:
        """Insert a page of rows into the target."""
        names = [column.name for column in self.target.columns]
        try:
            connection.execute(insert(self.target), [dict(zip(names, row, strict=True)) for row in page])
        except Exception as error:  # noqa: BLE001  a column type of the application can raise any error
            raise DatabaseError(
                f"the target refuses rows of {self.name} ({reason_of(error)}), so the copy was undone: correct the "
                f"rows in the source, or leave the table (leave={[self.name]!r})"
            ) from None

    def differs(self, source: Connection, target: Connection) -> bool:
        """Return True if the two databases have different rows."""
        return self.count(source) != self.count(target) or any(
            not self._is_copied(page, target) for page in self.pages(source)
        )

    def _is_copied(self, page: list[_Row], target: Connection) -> bool:
        key = [self.target.c[name] for name in self._key]
        places = [list(self.source.c).index(self.source.c[name]) for name in self._key]
        keys = [tuple(row[place] for place in places) for row in page]
        chosen = tuple_(*key).in_(keys) if len(key) > 1 else key[0].in_([one for (one,) in keys])
        found = self._read(target, select(*self.target.c).where(chosen))
        copied = {tuple(row[place] for place in places): row for row in found}
        return all(self._is_same(row, copied.get(one)) for one, row in zip(keys, page, strict=True))

    def _is_same(self, row: _Row, other: _Row | None) -> bool:
        # Also compare the texts, because the value NaN does not equal itself.
        if other is None or other == row or repr(other) == repr(row):
            return other is not None
        # PostgreSQL's type jsonb changes the text of a JSON value, and SQLite changes the text of a number.
        columns = zip(self.source.columns, self.target.columns, row, other, strict=True)
        return all(
            one == two
            or (
                isinstance(source.type, _JsonText)
                and isinstance(target.type, _JsonText)
                and None not in (one, two)
                and _parsed(one) == _parsed(two)
            )
            for source, target, one, two in columns
        )

    def _read(self, connection: Connection, rows: Any) -> list[_Row]:
        try:
            return [tuple(row) for row in connection.execute(rows)]
        except HomeAgentError:
            raise
        except Exception as error:  # noqa: BLE001  a column type of the application can raise any error
            raise CorruptDatabaseError(
                f"a row of {self.name} can't be read ({type(error).__name__}), so the copy was undone: correct the "
                f"row, or leave the table (leave={[self.name]!r})"
            ) from None

    def last_number(self, source: Connection) -> int:
        """Return the highest number that the source has assigned to a row, even if the row was deleted.

        If the source does not remember the highest number, return 0.
        """
        if source.dialect.name == "sqlite":
            if not source.execute(_HAS_SEQUENCES).first():
                return 0
            return int(source.execute(_SEQUENCE, {"table": self.name}).scalar() or 0)
        return max(
            (int(source.execute(_LAST_VALUE, names).scalar() or 0) for names in self._numbered(source)), default=0
        )

    def _numbered(self, connection: Connection) -> Iterator[dict[str, str]]:
        table = connection.dialect.identifier_preparer.quote(self.name)
        for name in self._key:
            if isinstance(self.target.c[name].type, Integer):
                yield {"table": table, "name": name}

    def advance_sequence(self, target: Connection, last: int) -> None:
        """Ensure that new rows in the target get numbers above the copied rows and above the given number."""
        if target.dialect.name == "sqlite":
            # SQLite uses the numbers of deleted rows again, except in a table with AUTOINCREMENT.
            if last and target.execute(_AUTOINCREMENT, {"table": self.name}).first():
                target.execute(_FORGET, {"table": self.name})
                target.execute(_REMEMBER, {"table": self.name, "last": last})
            return
        for names in self._numbered(target):
            column = self.target.c[names["name"]]
            highest = max(last, target.execute(select(func.max(column))).scalar() or 0)
            if highest > 0:
                target.execute(_SET_VALUE, {**names, "last": highest})


# SQLite has the table `sqlite_sequence` only after the first table with AUTOINCREMENT was created.
_HAS_SEQUENCES = text("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'")
_SEQUENCE = text("SELECT seq FROM sqlite_sequence WHERE name = :table")
_AUTOINCREMENT = text("SELECT 1 FROM sqlite_master WHERE name = :table AND upper(sql) LIKE '%AUTOINCREMENT%'")
_FORGET = text("DELETE FROM sqlite_sequence WHERE name = :table")
_REMEMBER = text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last)")
_LAST_VALUE = text("SELECT pg_sequence_last_value(CAST(pg_get_serial_sequence(:table, :name) AS regclass))")
_SET_VALUE = text("SELECT setval(s, :last) FROM pg_get_serial_sequence(:table, :name) AS s WHERE s IS NOT NULL")


def plan_own_tables(
    engines: tuple[Engine, Engine], source: Connection, target: Connection, leave: Collection[str]
) -> list[OwnTable]:
    """Return the application's tables to copy, in the order of their foreign keys.

    Raises:
        InvalidArgumentError: if the target lacks a table, or a table of the target has other columns. `leave=[…]` names
            tables to skip.
        TargetNotEmptyError: if a table of the target has rows.
    """
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
    tables = [_own_table(name, source, target, declared.get(name)) for name in _in_order(target, names)]
    _refuse_orphans(source, names)
    for table in tables:
        if target.execute(select(1).select_from(table.target).limit(1)).first() is not None:
            raise TargetNotEmptyError(table.name)
    if target.dialect.name == "sqlite":
        # The rows of a table can refer to later rows of the same table. COMMIT checks the foreign keys.
        target.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
    return tables


_REFERENCES = text(
    "SELECT c.relname, k.conname, p.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
    " JOIN pg_class p ON p.oid = k.confrelid WHERE k.contype = 'f' AND NOT k.condeferrable AND k.conparentid = 0"
    " AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())"
    " AND pg_has_role(c.relowner, 'USAGE')"
)


@contextmanager
def late_references(connection: Connection, tables: Sequence[OwnTable]) -> Iterator[None]:
    """On PostgreSQL, defer the check of foreign keys to the end of the block. The check is deferred only for tables in
    which a row can precede the row that it refers to.

    A row can precede the row that it refers to in two cases: a foreign key refers to its own table, or is part of a
    circle of tables. Only the owner of a table can defer the check of its foreign keys. SQLite defers all foreign keys
    to the COMMIT.
    """
    if not tables or connection.dialect.name == "sqlite":
        yield
        return
    place = {table.name: at for at, table in enumerate(tables)}
    quote = connection.dialect.identifier_preparer.quote
    late = [
        f"ALTER TABLE {quote(child)} ALTER CONSTRAINT {quote(name)}"
        for child, name, parent in connection.execute(_REFERENCES)
        if child in place and place.get(parent, -1) >= place[child]
    ]
    for alter in late:
        connection.execute(text(f"{alter} DEFERRABLE"))
    connection.execute(text("SET CONSTRAINTS ALL DEFERRED"))
    yield
    connection.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    for alter in late:
        connection.execute(text(f"{alter} NOT DEFERRABLE"))


def _in_order(connection: Connection, names: set[str]) -> list[str]:
    """Sort the names so that each table follows the tables that its foreign keys refer to."""
    inspector = inspect(connection)
    parents = {
        name: {key["referred_table"] for key in inspector.get_foreign_keys(name)} & names - {name}
        for name in sorted(names)
    }
    try:
        return list(TopologicalSorter(parents).static_order())
    except CycleError:
        return sorted(names)  # the function `late_references()` defers the foreign keys


def _own_table(name: str, source: Connection, target: Connection, declared: Table | None) -> OwnTable:
    sides = [_described(name, side, declared) for side in (source, target)]
    columns = [{column.name for column in side.columns} for side in sides]
    if columns[0] != columns[1]:
        shown = ", ".join(sorted(columns[0] ^ columns[1]))
        raise InvalidArgumentError(
            f"the table {name} has other columns in the target than in the source ({shown}): upgrade the application's "
            f"tables on both sides, or leave the table (leave={[name]!r}, or --leave)"
        )
    if not sides[0].primary_key.columns:
        raise InvalidArgumentError(
            f"the table {name} has no primary key, so its rows can't be compared: add a primary key, or leave the "
            f"table (leave={[name]!r}, or --leave)"
        )
    # SQLite accepts NULL in most primary keys.
    is_null = or_(*(column.is_(None) for column in sides[0].primary_key.columns))
    if source.execute(select(1).select_from(sides[0]).where(is_null).limit(1)).first() is not None:
        raise InvalidArgumentError(
            f"the table {name} has a row whose primary key is NULL: correct or delete the row, or leave the table "
            f"(leave={[name]!r}, or --leave)"
        )
    return OwnTable(name, *sides)


def _described(name: str, connection: Connection, declared: Table | None) -> Table:
    """Return a description of the table that contains only the writable columns, sorted by name."""
    inspector = inspect(connection)
    key = inspector.get_pk_constraint(name)["constrained_columns"]
    columns = []
    for found in sorted(inspector.get_columns(name), key=lambda found: found["name"]):
        if "computed" in found:
            continue
        known = None if declared is None else declared.columns.get(found["name"])
        kind: Any = found["type"] if known is None or isinstance(known.type, _STORED_ALIKE) else known.type
        if isinstance(kind, JSON) or isinstance(found["type"], JSON):
            kind = _JsonText(found["type"] if connection.dialect.name == "postgresql" else None)
        columns.append(Column(found["name"], kind, primary_key=found["name"] in key))
    return Table(name, MetaData(), *columns)


def _refuse_orphans(source: Connection, names: set[str]) -> None:
    if source.dialect.name != "sqlite":
        return
    orphans = sorted(keys for keys in broken_references(source) if keys[0] in names)
    if orphans:
        shown = ", ".join(f"{child} to {parent}" for child, parent in orphans)
        raise DatabaseError(
            f"rows of the application's tables refer to rows that do not exist ({shown}), and the target would refuse "
            "the rows: correct or delete the rows ('PRAGMA foreign_key_check' lists them), or leave the tables"
        )
