"""Values of the common column types of an application in a copy to another engine and back."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Column, MetaData, Table, insert, select

from homeagent import Database
from tests.migrations.own_revisions import write_revision


class Colour(Enum):
    """A choice of an application."""

    RED = 1
    BLUE = 2


own = MetaData()
values = Table(
    "own_values",
    own,
    Column("id", sa.Uuid, primary_key=True),
    Column("bytes", sa.LargeBinary),
    Column("number", sa.Numeric(12, 3)),
    Column("real", sa.Float),
    Column("day", sa.Date),
    Column("time", sa.Time),
    Column("span", sa.Interval),
    Column("at", sa.DateTime),
    Column("zoned", sa.DateTime(timezone=True)),
    Column("colour", sa.Enum(Colour, native_enum=False)),
    Column("note", sa.Text),
)
ZONED = values.columns.keys().index("zoned")
REVISION = (
    'op.create_table("own_values", sa.Column("id", sa.Uuid, primary_key=True), sa.Column("bytes", sa.LargeBinary),'
    ' sa.Column("number", sa.Numeric(12, 3)), sa.Column("real", sa.Float), sa.Column("day", sa.Date),'
    ' sa.Column("time", sa.Time), sa.Column("span", sa.Interval), sa.Column("at", sa.DateTime),'
    ' sa.Column("zoned", sa.DateTime(timezone=True)),'
    ' sa.Column("colour", sa.String(4)), sa.Column("note", sa.Text))'
)
ROWS: list[dict[str, Any]] = [
    {
        "id": UUID(int=7),
        "bytes": b"\x00\\N\xff\n",
        "number": Decimal("123456789.125"),
        "real": 0.1,
        "day": date(2026, 1, 2),
        "time": time(3, 4, 5, 678),
        "span": timedelta(days=2, microseconds=3),
        "at": datetime(2026, 1, 2, 3, 4, 5, 678),  # noqa: DTZ001  the column has no time zone
        "zoned": datetime(2026, 7, 2, 3, 4, 5, 678, tzinfo=UTC),
        "colour": Colour.BLUE,
        "note": "a\tb\n\\.\\N",
    },
    {column.name: UUID(int=8) if column.name == "id" else None for column in values.columns},
]


def stored(database: Database) -> list[tuple[Any, ...]]:
    """Return the rows of the application's table."""
    with database.read_connection() as connection:
        rows = [list(row) for row in connection.execute(select(values).order_by(values.c.id))]
    for row in rows:
        # SQLAlchemy reads a time from SQLite without its zone.
        row[ZONED] = row[ZONED] and (row[ZONED] if row[ZONED].tzinfo else row[ZONED].replace(tzinfo=UTC))
    return list(map(tuple, rows))


def test_common_types_are_copied(sqlite_path: Path, empty_postgres_url: str, tmp_path: Path) -> None:
    """A value of each common type is the same on the server and back in a file, NULL included."""
    folder = write_revision(tmp_path / "hub", "a1", None, REVISION).parents[1]
    with Database.open(sqlite_path, migrations=folder, metadata=[own]) as source:
        with source.unit_of_work() as unit:
            unit.session.connection().execute(insert(values), ROWS)
        with Database.open(empty_postgres_url, migrations=folder, metadata=[own]) as server:
            source.copy_to(server)
            assert stored(server) == stored(source) == [tuple(row.values()) for row in ROWS]
            with Database.open(tmp_path / "back" / "homeagent.db", migrations=folder, metadata=[own]) as back:
                server.copy_to(back)
                assert stored(back) == stored(source)
