"""The application's own tables in copies, backups, restores, the status and the doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Row, Table, insert, select, text

from homeagent import AgentSession, Database, diagnose
from homeagent.errors import DatabaseError, InvalidArgumentError, SchemaChangedError, TargetNotEmptyError
from homeagent.maintenance import CopyProgress, Finding, copied_tables
from tests.conftest import add_agent, add_device, postgres_execute
from tests.migrations.old_databases import sqlite
from tests.migrations.own_revisions import write_revision

OpenThree = Callable[..., list[Database]]


class Colour(Enum):
    """A choice of an application."""

    RED = 1
    BLUE = 2


# A foreign key between two MetaData objects needs the column itself, because a name is searched in one MetaData.
own = MetaData()
notes = Table(
    "notes",
    own,
    Column("id", Integer, primary_key=True),
    Column("session_id", ForeignKey(AgentSession.__table__.c.session_id), nullable=False),  # type: ignore[attr-defined]
    Column("parent_id", ForeignKey("notes.id")),
    Column("is_read", sa.Boolean, nullable=False),
    Column("seen_at", sa.DateTime(timezone=False)),
    Column("more", sa.JSON),
)
tags = Table(
    "a tag",
    own,
    Column("note_id", ForeignKey("notes.id"), primary_key=True),
    Column("Name", sa.String(20), primary_key=True),
)
types = MetaData()
values = Table(
    "own_values",
    types,
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
AT = datetime(2026, 1, 2, 3, 4, 5, 678901)  # noqa: DTZ001  the columns have no time zone
VALUES: list[tuple[Any, ...]] = [
    (
        UUID(int=7), b"\x00\\N\xff\n", Decimal("123456789.125"), 0.1, date(2026, 1, 2), time(3, 4, 5, 678),
        timedelta(days=2, microseconds=3), AT, datetime(2026, 7, 2, 3, 4, 5, 678, tzinfo=UTC), Colour.BLUE,
        "a\tb\n\\.\\N",
    ),
    (UUID(int=8), *[None] * 10),
]  # fmt: skip
CREATE = f"from {__name__} import {{0}}\n{{0}}.create_all(op.get_bind())"
"""The body of a revision that creates the tables of a MetaData."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the application's revision, which creates the notes and their tags."""
    return write_revision(tmp_path / "hub", "a1", None, CREATE.format("own")).parents[1]


@pytest.fixture
def open_three(sqlite_path: Path, empty_postgres_url: str, tmp_path: Path) -> Iterator[OpenThree]:
    """Opens a file, a server and another file with the application's revisions."""
    with ExitStack() as stack:

        def open_three(folder: Path, metadata: Sequence[MetaData] = (), **options: Any) -> list[Database]:
            targets = (sqlite_path, empty_postgres_url, tmp_path / "back" / "homeagent.db")
            # A copy also finds a type that only one of its two databases declares.
            declared = (metadata, metadata, metadata[:1])
            return [
                stack.enter_context(Database.open(target, migrations=folder, metadata=known, **options))
                for target, known in zip(targets, declared, strict=True)
            ]

        yield open_three


def run(database: Database, *statements: str) -> Any:
    """Run SQL statements in one unit, and return the value that the last statement returns."""
    with database.unit_of_work() as unit:
        *_, last = [unit.session.connection().execute(text(statement)) for statement in statements]
        return last.scalar() if last.returns_rows else None


def finding(database: Database, check: str = "schema") -> Finding:
    """Return a finding of the doctor."""
    found = database.doctor().finding(check)
    assert found is not None
    return found


def fill(database: Database, rows: int) -> None:
    """Insert rows into the application's tables."""
    add_agent(database)
    with database.unit_of_work() as unit:
        session = unit.sessions.resolve(agent_id="ada", sender_id="anna")
        connection = unit.session.connection()
        rows_of_notes: list[dict[str, Any]] = [
            {
                "id": number,
                "session_id": session.session_id,
                "parent_id": number // 2 or None,
                "is_read": bool(number % 2),
                "seen_at": AT if number % 3 else None,
                "more": {"b": [number, 1.5, None], "a": "ü"},
            }
            for number in range(1, rows + 1)
        ]
        connection.execute(insert(notes), rows_of_notes)
        names = [{"note_id": number, "Name": name} for number in range(1, rows + 1) for name in ("b", "B", "Ü")]
        connection.execute(insert(tags), names)


def stored(database: Database, *tables: Table) -> list[list[tuple[Any, ...]]]:
    """Return the rows of the application's tables."""
    with database.read_connection() as connection:
        return [sorted(map(row_of, connection.execute(select(table))), key=repr) for table in tables]


def row_of(row: Row[Any]) -> tuple[Any, ...]:
    """Return the values of a row. SQLAlchemy reads a time from SQLite without its zone."""
    read = row._asdict()
    if (zoned := read.get("zoned")) and zoned.tzinfo is None:
        read["zoned"] = zoned.replace(tzinfo=UTC)
    return tuple(read.values())


@pytest.mark.parametrize("declared", [True, False])
def test_copy_to_another_engine_and_back(
    open_three: OpenThree, folder: Path, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    """Own tables, declared with any common type, move to PostgreSQL and back, and new rows get new numbers."""
    monkeypatch.setattr(copied_tables, "PAGE", 40)
    tables = [notes, tags]
    if declared:
        write_revision(folder, "a2", "a1", CREATE.format("types"))
        tables = [*tables, values]
    source, server, back = open_three(folder, [types, own] if declared else [])
    seen: list[CopyProgress] = []
    fill(source, 41)
    if declared:
        with source.unit_of_work() as unit:
            unit.session.connection().execute(insert(values).values(VALUES))
        assert stored(source, values) == [VALUES]
    expected = stored(source, *tables)
    report = source.copy_to(server, progress=seen.append)
    assert (report.rows["notes"], report.rows["a tag"]) == (41, 123)
    assert seen[-1].rows == seen[-1].total
    assert stored(server, *tables) == expected
    server.copy_to(back)
    assert stored(back, *tables) == expected
    add = "INSERT INTO notes (session_id, is_read) SELECT session_id, false FROM sessions RETURNING id"
    assert run(server, add) == 42
    with pytest.raises(TargetNotEmptyError):
        source.copy_to(server)


NODES = (
    "import sqlalchemy.dialects.postgresql\n"
    'op.create_table("node", sa.Column("id", sa.Integer, primary_key=True), sa.Column("parent", sa.Integer,'
    ' sa.ForeignKey("node.id")), sa.Column("more", sa.JSON), sa.Column("b", sa.JSON().with_variant('
    'sa.dialects.postgresql.JSONB(), "postgresql")))'
)


def test_json_and_late_parents_are_copied(open_three: OpenThree, tmp_path: Path) -> None:
    """A copy keeps NULL apart from JSON's null, keeps all digits, and inserts a row before the row it refers to."""
    rows = [
        (-3, 0, None, '{"b":1,"a":2}'),
        (-2, -3, "null", None),
        (-1, -1, '{"n":  1.00000000000000000001}', "null"),
        (0, None, "5", "[1.50]"),
    ]
    query = text("SELECT id, parent, CAST(more AS TEXT), b IS NULL FROM node ORDER BY id")
    source, server, back = open_three(write_revision(tmp_path / "hub", "a1", None, NODES).parents[1])
    with source.unit_of_work() as unit:
        unit.session.connection().exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        for row in rows:
            unit.session.connection().exec_driver_sql("INSERT INTO node VALUES (?, ?, ?, ?)", row)
    source.copy_to(server)
    server.copy_to(back)
    for database in (server, back):
        with database.read_connection() as connection:
            assert [tuple(row) for row in connection.execute(query)] == [(*row[:3], row[3] is None) for row in rows]
    assert run(server, "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND condeferrable") == 0


def test_numbers_of_deleted_rows_are_not_used_again(open_three: OpenThree, tmp_path: Path) -> None:
    """With AUTOINCREMENT, and on PostgreSQL, a row in a copy does not get the number of a row that was deleted."""
    create = 'op.create_table("log", sa.Column("id", sa.Integer, primary_key=True), sqlite_autoincrement=True)'
    add = "INSERT INTO log DEFAULT VALUES RETURNING id"
    source, server, back = open_three(write_revision(tmp_path / "hub", "a1", None, create).parents[1])
    run(source, add, add, add, "DELETE FROM log WHERE id > 1")
    source.copy_to(server)
    assert run(server, add) == 4
    run(server, "DELETE FROM log")
    server.copy_to(back)
    assert run(back, add) == 5


AUDIT = """
op.create_table("log", sa.Column("id", sa.Integer, primary_key=True), sa.Column("device", sa.Text))
body = "BEGIN INSERT INTO log (device) VALUES (NEW.id);"
how = f"{body} END"
if op.get_bind().dialect.name == "postgresql":
    op.execute(f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS '{body} RETURN NULL; END'")
    how = "FOR EACH ROW EXECUTE FUNCTION f()"
op.execute(f"CREATE TRIGGER audit AFTER INSERT ON devices {how}")
"""


def test_triggers_do_not_run_during_a_copy(open_three: OpenThree, tmp_path: Path) -> None:
    """The application's triggers write no rows during a copy, and homeagent's do. Later, all triggers run again."""
    folder = write_revision(tmp_path / "hub", "a1", None, AUDIT).parents[1]
    source, server, back = open_three(folder, acknowledged=["audit"])
    run(server, "ALTER TABLE devices ENABLE ALWAYS TRIGGER audit")
    add_device(source, "one")
    source.copy_to(server)
    server.copy_to(back, leave=["log"])
    assert run(server, "SELECT tgenabled FROM pg_trigger WHERE tgname = 'audit'") == "A"
    for database, expected in ((server, ["one", "two"]), (back, ["two"])):
        assert run(database, "SELECT number > 0 FROM device_changes WHERE kind = 'reset'")
        add_device(database, "two")
        with database.read_connection() as connection:
            assert list(connection.execute(text("SELECT device FROM log ORDER BY id")).scalars()) == expected
        assert run(database, "SELECT device_id FROM device_changes ORDER BY number DESC LIMIT 1") == "two"


def test_triggers_fill_a_search_index_during_a_copy(tmp_path: Path) -> None:
    """A copy leaves out virtual tables, so the triggers that fill a search index run during the copy."""
    with ExitStack() as stack:
        source, target = (stack.enter_context(Database.open(tmp_path / name / "h.db")) for name in ("one", "two"))
        for database in (source, target):
            with database.unit_of_work() as unit:
                for statement in (
                    "CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT)",
                    "CREATE VIRTUAL TABLE words USING fts5 (body, content='notes', content_rowid='id')",
                    "CREATE TRIGGER notes_in AFTER INSERT ON notes BEGIN"
                    " INSERT INTO words (rowid, body) VALUES (NEW.id, NEW.body); END",
                ):
                    unit.session.execute(text(statement))
        with source.unit_of_work() as unit:
            unit.session.execute(text("INSERT INTO notes VALUES (1, 'a door')"))
        with target.read_connection() as connection:
            left = connection.execute(text("SELECT name FROM sqlite_master WHERE name LIKE 'words%'")).scalars().all()
        source.copy_to(target, leave=left)
        with target.read_connection() as connection:
            assert connection.execute(text("SELECT rowid FROM words WHERE words MATCH 'door'")).scalars().all() == [1]


@pytest.mark.parametrize(("key", "other"), [("a", "a, b"), ("a, b", "a"), ("a", "b")])
def test_a_target_with_another_primary_key(tmp_path: Path, key: str, other: str) -> None:
    """A table is copied and compared by the key of the source, also if the target's table has another primary key."""
    with ExitStack() as stack:
        source, target = (stack.enter_context(Database.open(tmp_path / name / "h.db")) for name in ("one", "two"))
        for database, columns in ((source, key), (target, other)):
            with database.unit_of_work() as unit:
                statement = f"CREATE TABLE pairs (a INTEGER NOT NULL, b INTEGER NOT NULL, PRIMARY KEY ({columns}))"
                unit.session.execute(text(statement))
        with source.unit_of_work() as unit:
            unit.session.execute(text("INSERT INTO pairs VALUES (1, 10), (2, 20)"))
        assert source.copy_to(target).rows["pairs"] == 2


def test_unknown_tables_are_named(sqlite_path: Path, tmp_path: Path, folder: Path) -> None:
    """A copy refuses tables that the target lacks by name, unless the caller leaves them behind."""
    with Database.open(sqlite_path, migrations=folder) as source, Database.open(tmp_path / "new" / "x.db") as target:
        fill(source, 1)
        with pytest.raises(
            InvalidArgumentError, match=r"the target does not have: a tag, notes\..*--migrations.*--leave"
        ):
            source.copy_to(target)
        with pytest.raises(InvalidArgumentError, match="does not have: notes"):
            source.copy_to(target, leave=["a tag"])
        with pytest.raises(InvalidArgumentError, match="leave names a table that the source does not have: no"):
            source.copy_to(target, leave=["no"])
        report = source.copy_to(target, leave=["a tag", "notes"])
        assert not {"a tag", "notes"} & set(report.rows)
        assert report.rows["sessions"] == 1


def test_a_parent_table_that_is_left(open_three: OpenThree, tmp_path: Path) -> None:
    """If a copy leaves a parent table, the error names the refused table and the remedy."""
    create = "CREATE TABLE room (id INTEGER PRIMARY KEY)", "CREATE TABLE lamp (id INTEGER PRIMARY KEY, room INTEGER %s)"
    folder = write_revision(
        tmp_path / "hub", "a1", None, f'op.execute("{create[0]}"); op.execute("{create[1] % "REFERENCES room (id)"}")'
    ).parents[1]
    source, *targets = open_three(folder)
    run(source, "INSERT INTO room VALUES (1)", "INSERT INTO lamp VALUES (1, 1)")
    for target in targets:
        with pytest.raises(DatabaseError, match=r"refuses rows of lamp .* leave the table \(leave=\['lamp'\]\)"):
            source.copy_to(target, leave=["room"])
        assert run(target, "SELECT count(*) FROM lamp") == 0


def test_orphan(sqlite_path: Path, tmp_path: Path, folder: Path) -> None:
    """An orphan in an own table is named, and prevents neither a backup, a restore nor an upgrade."""
    with Database.open(sqlite_path, migrations=folder) as source:
        fill(source, 2)
    with closing(sqlite(sqlite_path)) as raw:
        raw.execute("DELETE FROM notes WHERE id = 1")
    diagnosis = diagnose(sqlite_path)
    application, references = diagnosis.finding("application"), diagnosis.finding("references")
    assert application is not None
    assert references is not None
    assert (references.severity, application.severity) == ("ok", "warning")
    assert (application.facts["tables"], application.facts["rows"], application.facts["orphans"]) == (2, 7, 4)
    assert "from a tag to notes: 3" in application.summary
    assert "from notes to notes: 1" in application.summary
    write_revision(folder, "a2", "a1", 'op.add_column("notes", sa.Column("extra", sa.Text))')
    with Database.open(sqlite_path, migrations=folder) as source:
        backup = source.backup(tmp_path / "the.backup")
        with Database.open(tmp_path / "new" / "x.db", migrations=folder) as target:
            with pytest.raises(DatabaseError, match="a tag to notes, notes to notes"):
                source.copy_to(target)
            source.copy_to(target, leave=["a tag", "notes"])
    report = Database.restore(backup, sqlite_path)
    assert (report.rows["notes"], report.rows["a tag"]) == (1, 6)


def add_trigger(database: Database, target: str, *, can_change_rows: bool) -> None:
    """Create the trigger `audit` on the agents. On PostgreSQL only a BEFORE trigger can change the row."""
    moment, result = ("BEFORE", "NEW") if can_change_rows else ("AFTER", "NULL")
    body = f"BEGIN {'UPDATE devices SET approved = 1' if can_change_rows else 'SELECT 1'}; END"
    if target.startswith("postgresql"):
        body = "FOR EACH ROW EXECUTE FUNCTION f()"
        function = f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN {result}; END'"
        postgres_execute(target, function)
    run(database, f"CREATE TRIGGER audit {moment} INSERT ON agents {body}")


def test_objects_of_the_application(target: str, folder: Path, tmp_path: Path) -> None:
    """Status and doctor count own rows; the doctor names an own view, index and trigger, which can be acknowledged."""
    with Database.open(target, migrations=folder) as database:
        fill(database, 2)
        status = database.status()
        assert (status.rows["notes"], status.rows["a tag"], status.application_revision) == (2, 6, "a1")
        application = finding(database, "application")
        assert application.severity == "ok"
        assert "at revision a1: a tag (rows: 6), notes (rows: 2)" in application.summary
        add_trigger(database, target, can_change_rows=False)
        run(database, "CREATE INDEX own_index ON agents (name)", "CREATE VIEW own_view AS SELECT id FROM agents")
        found = finding(database)
        assert found.severity == "warning"
        assert "changed by hand" not in found.summary
        assert all(name in found.summary for name in ("trigger audit", "index own_index", "view own_view"))
        assert "acknowledged=['audit']" in str(found.remedy)
        assert "DROP VIEW own_view" in str(found.remedy)
        with Database.open(tmp_path / "new" / "x.db", migrations=folder) as copy, pytest.raises(SchemaChangedError):
            database.copy_to(copy)
    with Database.open(target, migrations=folder, acknowledged=["audit"]) as database:
        found = finding(database)
        assert found.facts["acknowledged"] == "audit"
        assert "acknowledged=" not in (found.remedy or "")
        with Database.open(tmp_path / "new" / "x.db", migrations=folder) as copy:
            database.copy_to(copy)
        if not target.startswith("postgresql"):
            backup = database.backup(tmp_path / "the.backup")
            with pytest.raises(SchemaChangedError, match=r"acknowledged=\['audit'\] or --acknowledge"):
                Database.restore(backup, tmp_path / "restored" / "x.db")
            Database.restore(backup, tmp_path / "restored" / "x.db", acknowledged=["audit"])


def test_trigger_that_can_change_rows(target: str) -> None:
    """A trigger of the application that can change homeagent's rows is critical, and the remedy names both choices."""
    with Database.open(target) as database:
        add_trigger(database, target, can_change_rows=True)
        found = finding(database)
    assert found.severity == "critical"
    assert "DROP TRIGGER audit" in str(found.remedy)
    assert "acknowledged=['audit']" in str(found.remedy)
    with Database.open(target, acknowledged=["audit"]) as database:
        assert finding(database).severity == "ok"
