"""The application's own revisions, which `Database.open` runs after homeagent's revisions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Database
from homeagent.errors import InvalidArgumentError, MigrationError, SchemaOutdatedError, SchemaTooNewError
from homeagent.testing import FakeClock
from tests.conftest import add_agent
from tests.migrations.old_databases import change, clock, fetch, old_database, rows_of
from tests.migrations.own_revisions import CREATE, REBUILD, write_revision, write_revisions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an application's three revisions."""
    return write_revisions(tmp_path / "hub" / "migrations")


def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query."""
    with database.read_connection() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def add_note(database: Database, note: str) -> None:
    """Insert a row that refers to a session."""
    add_agent(database)
    with database.unit_of_work() as unit:
        session = unit.sessions.resolve(agent_id="ada", sender_id="anna")
        values = {"session": session.session_id, "note": note}
        unit.session.connection().execute(text("INSERT INTO notes (session_id, text) VALUES (:session, :note)"), values)


def test_current_database(target: str, folder: Path, tmp_path: Path) -> None:
    """A database with homeagent's tables gets the application's, and a rebuild of a table keeps the rows."""
    first = write_revision(tmp_path / "first", "a1", None, CREATE).parents[1]
    with pytest.raises(SchemaOutdatedError, match=r"is at revision None of the application .*first") as outdated:
        Database.open(target, migrations=first, migrate=False)
    assert outdated.value.application == str(first)
    with Database.open(target, migrations=first) as database:
        add_note(database, "kept")
    with pytest.raises(SchemaOutdatedError, match=r"is at revision 'a1' of .*needed is 'a3': .*migrate --migrations"):
        Database.open(target, migrations=folder, migrate=False)
    for migrate in (True, False, True):  # the second and third open change nothing
        with Database.open(target, migrations=folder, migrate=migrate) as database:
            assert rows(database, "SELECT version_num FROM application_schema_version") == [("a3",)]
            assert rows(database, "SELECT text, stars FROM notes") == [("kept", 0)]
    with Database.open(target, migrations=folder) as database:
        (session,) = database.sessions.list()
        database.sessions.delete(session.session_id)
        assert rows(database, "SELECT count(*) FROM notes") == [(0,)]


def test_failed_attempts_keep_one_backup(tmp_path: Path, folder: Path) -> None:
    """One backup precedes both upgrades; a new attempt replaces only the backup of a failed attempt."""
    path, time = old_database(tmp_path, "0001"), FakeClock(clock())
    before = rows_of(path)

    def upgrade() -> Path:
        time.advance(minutes=1)
        Database.open(path, migrations=folder, clock=time).close()
        return max(tmp_path.glob("*Z.backup"))

    def failed_upgrade() -> Path:
        with pytest.raises(MigrationError) as caught:
            upgrade()
        assert caught.value.backup is not None
        return caught.value.backup

    kept = {upgrade()}
    assert set(tmp_path.glob("*.backup")) == kept
    assert rows_of(max(kept)) == before
    assert fetch(path, "SELECT version_num FROM application_schema_version") == [("a3",)]
    write_revision(folder, "a4", "a3", "op.execute(\"UPDATE notes SET text = ''\")")  # changes no schema
    kept.add(upgrade())
    a5 = write_revision(folder, "a5", "a4", 'raise KeyError("a value")')
    failed = failed_upgrade()
    kept.add(tmp_path / "homeagent.db.of-a-user.backup")
    for suffix in ("", ".json"):
        shutil.copy(f"{failed}{suffix}", tmp_path / f"homeagent.db.of-a-user.backup{suffix}")
    for _ in range(2):
        failed = failed_upgrade()
        assert set(tmp_path.glob("*.backup")) == {*kept, failed}
    a5.unlink()
    write_revision(folder, "a5", "a4", 'op.drop_table("notes")')
    kept.add(upgrade())
    assert set(tmp_path.glob("*.backup")) == kept
    assert {path.with_suffix("") for path in tmp_path.glob("*.json")} == kept
    a5.unlink()
    change(  # a manual downgrade
        path, "CREATE TABLE notes (id INTEGER, text TEXT)", "UPDATE application_schema_version SET version_num = 'a4'"
    )
    write_revision(folder, "a5", "a4", 'raise KeyError("a value")')
    failed = failed_upgrade()
    assert set(tmp_path.glob("*.backup")) == {*kept, failed}


def test_unknown_revision(target: str, folder: Path) -> None:
    """If the application was set back to an older version, the error names the application and both revisions."""
    Database.open(target, migrations=folder).close()
    (folder / "versions" / "a3.py").unlink()
    with pytest.raises(SchemaTooNewError, match=r"revision 'a3' of the application .*up to 'a2'") as caught:
        Database.open(target, migrations=folder)
    assert caught.value.application == str(folder)
    Database.open(target).close()


REFUSED = {
    "column": 'op.add_column("agents", sa.Column("extra", sa.Text))',
    "index": 'op.create_index("idx_extra", "devices", ["id"])',
    "rows": "op.execute(\"UPDATE agents SET name = 'other'\")",
    "table": 'op.execute("DROP TABLE nonces")',
    "version": "op.execute(\"UPDATE homeagent_schema_version SET version_num = '0001'\")",
    "swallowed": 'try:\n    with op.get_bind().begin_nested():\n        op.execute("DELETE FROM nonces")\n'
    '        op.execute("DROP TABLE nonces")\nexcept Exception:\n    pass\nop.execute("DROP INDEX idx_sessions_agent")',
}


def test_change_of_a_table_of_homeagent(target: str, folder: Path) -> None:
    """A revision that changes homeagent's tables is refused by name, and the transaction is undone."""
    with Database.open(target, migrations=folder) as database:
        add_note(database, "kept")
    extra = 'op.create_table("extra", sa.Column("id", sa.Integer))'
    # On the server, a third of the statements shows that the triggers of that engine refuse them too.
    for body in list(REFUSED.values())[:: 3 if target.startswith("postgresql") else 1]:
        script = write_revision(folder, "a4", "a3", f"{extra}\n{body}")
        with pytest.raises(
            MigrationError, match=r"revision 'a4' of .*it changes homeagent's table [a-z_]+, which"
        ) as caught:
            Database.open(target, migrations=folder)
        assert (caught.value.backup is not None) == (not target.startswith("postgresql"))
        script.unlink()
        with Database.open(target, migrations=folder) as database:
            assert rows(database, "SELECT name FROM agents") == [("Ada",)]
            assert rows(database, "SELECT version_num FROM application_schema_version") == [("a3",)]
            schema = database.doctor().finding("schema")
            assert schema is not None
            assert schema.severity == "ok"
    write_revision(folder, "a4", "a3", extra)
    Database.open(target, migrations=folder).close()


def test_acknowledged_trigger(target: str, folder: Path) -> None:
    """A revision can create a trigger on a table of homeagent only if the trigger is acknowledged by name."""
    if target.startswith("postgresql"):
        trigger = "EXECUTE FUNCTION suppress_redundant_updates_trigger()"
        statement = f"CREATE TRIGGER audit BEFORE UPDATE ON devices FOR EACH ROW {trigger}"
    else:
        statement = "CREATE TRIGGER audit AFTER INSERT ON devices BEGIN INSERT INTO notes (text) VALUES ('new'); END"
    write_revision(folder, "a4", "a3", f'op.execute("{statement}")')
    with pytest.raises(MigrationError, match=r"homeagent's table devices.*acknowledged"):
        Database.open(target, migrations=folder)
    Database.open(target, migrations=folder, acknowledged=["audit"]).close()


FAILING = [
    ('raise KeyError("a value")', r"the revision 'a4' of .*migrations, line \d of a4\.py: KeyError\)"),
    (
        'op.execute("INSERT INTO nowhere VALUES (1)")',
        r"upgrading \S+( schema)? failed .*the revision 'a4' of .*, line \d of a4\.py: .*nowhere",
    ),
    ("pass\n\nimport nothing", r"the revisions of .*migrations, line \d+ of a4\.py: ModuleNotFoundError\)"),
    ("op.execute(\"INSERT INTO notes (id, session_id) VALUES (1, 'no')\")", "notes"),
    ('op.create_table("HomeAgent_x", sa.Column("id", sa.Integer))', "'a4' of .*'HomeAgent_x'.*another name"),
    ('op.execute("COMMIT")\nop.execute("SELECT * FROM nowhere")', r"'a4' of .*it sends COMMIT or ROLLBACK"),
]


@pytest.mark.parametrize(
    ("engine_name", "body", "reason"),
    [*(("sqlite", *each) for each in FAILING), *(("postgresql", *each) for each in FAILING[1::4])],
)
def test_failed_revision_is_undone(target: str, folder: Path, body: str, reason: str) -> None:
    """If a revision of the application fails, the error names the revision, and the new tables are gone."""
    write_revision(folder, "a4", "a3", f'op.create_table("extra", sa.Column("id", sa.Integer))\n{body}')
    if target.startswith("postgresql"):
        # CREATE INDEX CONCURRENTLY of a3 would commit the revisions before it.
        (folder / "versions" / "a3.py").unlink()
        write_revision(folder, "a4", "a2", f'op.create_table("extra", sa.Column("id", sa.Integer))\n{body}')
    with pytest.raises(MigrationError, match=reason) as caught:
        Database.open(target, migrations=folder)
    assert "a value" not in str(caught.value)
    with Database.open(target) as database, pytest.raises(Exception, match="notes"):
        rows(database, "SELECT * FROM notes")


def test_annotations_of_a_revision(sqlite_path: Path, tmp_path: Path) -> None:
    """The annotations in a revision are objects, not texts."""
    write_revision(tmp_path, "a1", None, "def of(row: int): pass\nassert of.__annotations__ == {'row': int}")
    Database.open(sqlite_path, migrations=tmp_path).close()


def test_view_of_a_rebuilt_table(sqlite_path: Path, folder: Path) -> None:
    """On SQLite the error for a view that prevents a rebuild of its table names the view and the remedy."""
    write_revision(folder, "a4", "a3", f"op.execute('CREATE VIEW texts AS SELECT text FROM notes')\n{REBUILD}")
    with pytest.raises(
        MigrationError, match=r"error in view texts: .* \(drop the view first, and create the view again"
    ):
        Database.open(sqlite_path, migrations=folder)


END_OF_TRANSACTION = {
    'op.execute("COMMIT")': "it sends COMMIT or ROLLBACK",
    'op.execute("/* x */ COMMIT")': "it sends COMMIT or ROLLBACK",
    'op.execute("; -- x\\nROLLBACK")': "it sends COMMIT or ROLLBACK",
    "op.get_bind().commit()": "it sends COMMIT or ROLLBACK",
    "op.get_bind().rollback()": "it sends COMMIT or ROLLBACK",
    'op.execute("INSERT INTO extra VALUES (1); COMMIT")': "it has ended its transaction",
    'op.execute("INSERT INTO extra VALUES (1); ROLLBACK")': "it has ended its transaction",
    'op.get_bind().connection.driver_connection.execute("COMMIT")': "it has ended its transaction",
    'op.get_bind().connection.driver_connection.execute("ROLLBACK")': "it has ended its transaction",
}


@pytest.mark.parametrize("later", ["pass", "raise KeyError"])
def test_end_of_the_transaction(target: str, tmp_path: Path, later: str) -> None:
    """A revision that ends its transaction fails, and the error says that it was undone only if that is true."""
    extra = 'op.create_table("extra", sa.Column("id", sa.Integer, primary_key=True))'
    for body, reason in END_OF_TRANSACTION.items():
        is_prevented = not target.startswith("postgresql") or "sends" in reason
        outcome = r"failed and was undone \(" if is_prevented else r"failed \("
        expected = "it sends COMMIT or ROLLBACK" if is_prevented else reason
        if later != "pass" and "driver_connection" in body and not is_prevented:
            expected = "KeyError"  # homeagent checks the transaction at the next statement
        write_revision(tmp_path, "a1", None, f"{extra}\n{body}\n{later}")
        with pytest.raises(MigrationError, match=rf"{outcome}.*{expected}"):
            Database.open(target, migrations=tmp_path)
        with Database.open(target) as database:
            status = database.status()
            assert status.application_revision is None
            assert ("extra" in status.rows) == (not is_prevented and "ROLLBACK" not in body), body
            if "extra" in status.rows:
                database.run(lambda unit: unit.session.connection().execute(text("DROP TABLE extra")))


def test_coroutine(target: str, tmp_path: Path) -> None:
    """A revision whose upgrade() is a coroutine function is refused, because Alembic would not run the coroutine."""
    script = write_revision(tmp_path, "a1", None, "pass")
    script.write_text(script.read_text().replace("def upgrade", "async def upgrade"))
    with pytest.raises(MigrationError, match=r"revision 'a1' of .*upgrade\(\) is a coroutine.*Write 'def upgrade\(\)'"):
        Database.open(target, migrations=tmp_path)


def test_closed_connection(target: str, tmp_path: Path) -> None:
    """If a revision closes the connection, the error is a MigrationError, and the new table is gone."""
    write_revision(tmp_path, "a1", None, f"{CREATE}\nop.get_bind().close()")
    with pytest.raises(MigrationError, match=r"failed and was undone .*(ClosedError|closes the connection)"):
        Database.open(target, migrations=tmp_path)
    with Database.open(target) as database:
        assert "notes" not in database.status().rows


def test_statement_outside_a_transaction(empty_postgres_url: str, folder: Path) -> None:
    """On PostgreSQL a revision can leave the transaction only before its first statement, and what is done stays."""
    # After the block of a3, the upgrade still holds both locks that keep out other hosts and Alembic's commands.
    late = (
        "held = \"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()\"\n"
        "assert op.get_bind().execute(sa.text(held)).scalar() == 2\n"
        "with op.get_context().autocommit_block():\n    pass"
    )
    write_revision(folder, "a4", "a3", late)
    with pytest.raises(MigrationError, match=r"'a4' of .*it runs statements before its autocommit_block"):
        Database.open(empty_postgres_url, migrations=folder)
    write_revision(folder, "a4", "a3", 'op.drop_column("notes", "stars")')
    with Database.open(empty_postgres_url, migrations=folder) as database:
        assert rows(database, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_notes_text'::regclass") == [
            (True,)
        ]
        assert rows(database, "SELECT version_num FROM application_schema_version") == [("a4",)]


def test_change_that_is_undone_after_the_block(empty_postgres_url: str, folder: Path) -> None:
    """On PostgreSQL a change of homeagent's table in an autocommit_block is refused, even if it is undone later."""
    body = (
        "with op.get_context().autocommit_block():\n"
        "    op.execute(\"ALTER TABLE agents ALTER COLUMN name SET DEFAULT 'x'\")\n"
        'op.execute("ALTER TABLE agents ALTER COLUMN name DROP DEFAULT")'
    )
    write_revision(folder, "a4", "a3", body)
    with pytest.raises(MigrationError, match="it changes homeagent's table agents"):
        Database.open(empty_postgres_url, migrations=folder)


TOUCHED = {
    "sessions": "ALTER TABLE sessions DISABLE TRIGGER ALL",
    "agents": "CREATE TABLE extra () INHERITS (agents)",
    "devices": "CREATE OR REPLACE FUNCTION homeagent_record_device_change() RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN RETURN NULL; END'",
    "device_changes": "ALTER SEQUENCE device_changes_numbers RESTART 1",
}


@pytest.mark.parametrize("table", TOUCHED)
def test_change_of_an_object_of_a_table(empty_postgres_url: str, folder: Path, table: str) -> None:
    """On PostgreSQL a revision that changes a table's checks, heirs, functions or sequences is refused by name."""
    write_revision(folder, "a4", "a3", f"op.execute({TOUCHED[table]!r})")
    with pytest.raises(MigrationError, match=rf"'a4' of .*it changes homeagent's table {table}, which"):
        Database.open(empty_postgres_url, migrations=folder)


# What makes the revisions unusable. A string or a number is the argument `migrations`.
BROKEN: dict[str, Any] = {
    "there is no folder 'nowhere/versions'.*homeagent migrations new": "nowhere",
    "'no_package' can't be imported": "no_package:migrations",
    "there is no folder": "json:migrations",
    "'ast' is a module and not a package.*pass the path": "ast:migrations",
    "must be 'package:folder' or a path": 3,
    "must have one head and have 2": lambda folder: write_revision(folder, "b3", "a2", "pass"),
    "have one head": lambda folder: write_revision(folder, "a1", "a3", "pass"),
    "refer to the revision 'no'": lambda folder: write_revision(folder, "b1", "no", "pass"),
    "two scripts of .* have the revision 'a3'": lambda folder: (folder / "versions" / "copy.py").write_text(
        (folder / "versions" / "a3.py").read_text()
    ),
    "x.py of .* is not a revision": lambda folder: (folder / "versions" / "x.py").write_text("revision ="),
    "1 to 32 characters": lambda folder: write_revision(folder, "long" * 10, "a3", "pass"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_unusable_revisions(tmp_path: Path, folder: Path, problem: str) -> None:
    """A missing package or folder, and scripts that are not one line of revisions, raise before a file is made."""
    make: Any = BROKEN[problem]
    if callable(make):
        make(folder)
    with pytest.raises(InvalidArgumentError, match=problem):
        Database.open(tmp_path / "new" / "homeagent.db", migrations=folder if callable(make) else make)
    assert not (tmp_path / "new").exists()
