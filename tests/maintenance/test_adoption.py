"""`homeagent init --adopt`: an application's database that is older than homeagent."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent import Database
from homeagent.engine.target import Target
from homeagent.errors import DatabaseBusyError, DatabaseError, ForeignDatabaseError
from homeagent.maintenance.adoption import adopt, preview_adoption
from homeagent.migrations import REVISION
from homeagent.migrations.application import Application
from tests import fork_server
from tests.command_line import Result, invoke
from tests.conftest import postgres_execute
from tests.engine.files.conftest import snapshot
from tests.migrations.old_databases import SPECIFICATION, change, fetch, is_sound, killed_at_statements, rows_of
from tests.migrations.own_revisions import write_revision

ROWS = """
INSERT INTO agents VALUES ('ada', 'Ada', '/srv/ada', 1, '{}');
INSERT INTO devices VALUES ('lamp', 'node', 'hash', 1, 1, NULL, NULL), (NULL, 'node', 'hash', 1, 1, NULL, NULL),
  (NULL, 'admin', 'hash', 1, 1, NULL, NULL);
INSERT INTO sessions VALUES ('s-1', 'ada', 'anna', NULL, 1, 2);
INSERT INTO nonces VALUES ('n-1', 'lamp', 1, 2), (NULL, 'lamp', 1, 2);
INSERT INTO idempotency_keys VALUES ('k-1', 'open', 'lamp', 'null', 1, 2);
"""
OWN = """
CREATE TABLE notes (id INTEGER PRIMARY KEY, session_id TEXT REFERENCES sessions(session_id), words TEXT);
INSERT INTO notes VALUES (1, 's-1', 'kept');
CREATE VIRTUAL TABLE search USING fts5 (words);
CREATE INDEX own_roles ON devices (lower(role), paired_at DESC);
CREATE VIEW own_lamps AS SELECT id FROM devices WHERE role = 'node';
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);
INSERT INTO alembic_version VALUES ('a1');
"""
MOVED = {"devices_without_key": 2, "nonces_without_key": 1}
NO_REVISIONS = Application(adopts=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of another program with the tables of the first version and with own tables."""
    (tmp_path / "private").mkdir(mode=0o700)
    path = tmp_path / "private" / "hub.db"
    change(path, SPECIFICATION + ROWS + OWN)
    path.chmod(0o644)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the application's revisions. The first revision has run before the adoption."""
    folder = tmp_path / "migrations"
    write_revision(folder, "a1", None, 'raise AssertionError("the revision runs again")')
    write_revision(folder, "a2", "a1", 'op.add_column("notes", sa.Column("stars", sa.Integer))')
    return folder


def init(target: object, *arguments: object, answer: str = "") -> Result:
    """Run `homeagent init --adopt`."""
    return invoke("--database", target, "init", "--adopt", *arguments, input=answer)


def test_a_file_of_the_first_version(file: Path, folder: Path) -> None:
    """The confirmed adoption keeps every row, moves rows without a key, and the other commands accept the file."""
    before, content = snapshot(file.parent), rows_of(file)
    for migrate in (True, False):
        with pytest.raises(ForeignDatabaseError, match="homeagent init --adopt"):
            Database.open(file, migrate=migrate)
    for answer in ("n\n", "\n"):
        refused = init(file, "--migrations", folder, answer=answer)
        assert refused.exit_code == 1
        assert "devices_without_key (2 rows), nonces_without_key (1 rows)" in refused.stderr
    assert init(file, "--json").exit_code == 2
    assert snapshot(file.parent) == before
    done = init(file, "--yes", "--json", "--migrations", folder)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["action"], report["moved"], report["application_revision"]) == ("adopted", MOVED, "a1")
    assert report["converted"] == {"agents": 1, "devices": 1, "idempotency_keys": 1, "nonces": 1, "sessions": 1}
    assert report["tables"]["notes"] == 1
    assert rows_of(Path(report["backup"])) == content
    after = rows_of(file)
    assert [row["role"] for row in after["devices_without_key"]] == ["admin", "node"]
    assert [row["id"] for row in after["devices"]] == ["lamp"]
    assert fetch(file, "SELECT * FROM notes") == [(1, "s-1", "kept", None)]
    assert fetch(file, "SELECT id FROM own_lamps") == [("lamp",)]
    assert fetch(file, "SELECT count(*) FROM sqlite_master WHERE sql LIKE '%lower(role), paired_at DESC%'") == [(1,)]
    with Database.open(file, migrations=folder) as database:
        assert database.status().application_revision == "a2"
        assert database.devices.get("lamp").role == "node"
        assert database.sessions.get("s-1").sender_id == "anna"
        assert not [finding for finding in database.doctor().findings if finding.severity == "critical"]
        database.backup(file.with_name("new.backup"))
    Database.restore(file.with_name("new.backup"), file)
    assert fetch(file, "SELECT count(*) FROM devices_without_key") == [(2,)]
    with pytest.raises(ForeignDatabaseError):
        Database.restore(report["backup"], file)
    assert "nothing to do" in init(file, "--migrations", folder).stdout


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_own_tables_only(tmp_path: Path, mode: str) -> None:
    """A file without homeagent's tables, or without its application id, is adopted in each journal mode."""
    path = tmp_path / "hub.db"
    change(path, f"PRAGMA journal_mode={mode}; PRAGMA application_id=7; {OWN.split('CREATE IND')[0]}")
    done = init(path, "--yes")
    assert done.exit_code == 0, done.output
    assert "Application id of the file, which homeagent replaces: 0x7" in done.stdout
    with Database.open(path) as database:
        assert database.status().rows["notes"] == 1
    assert fetch(path, "PRAGMA foreign_key_check") == [("notes", 1, "sessions", 0)]
    # A missing file, and a file of homeagent that another tool loaded from SQL statements
    path = tmp_path / "new" / "hub.db"
    assert init(path).exit_code == 0
    with Database.open(path) as database, database.unit_of_work() as unit:
        unit.nonces.consume("lamp", "n-1", expires_at=unit.now() + timedelta(days=1))
    path.with_name("hub.db.lock").unlink()
    change(path, f"PRAGMA journal_mode={mode}; PRAGMA application_id=0")
    assert init(path, "--yes").exit_code == 0
    with Database.open(path) as database:
        assert database.status().rows["nonces"] == 1


def test_revisions_of_an_adopted_file(file: Path, folder: Path) -> None:
    """An adoption is undone if a row can't be converted, and can be completed later by the application's revisions."""
    ((sender,),) = fetch(file, "SELECT sender_id FROM sessions")
    change(file, "UPDATE sessions SET sender_id = x'00ff'")
    before = rows_of(file)
    refused = init(file, "--yes")
    assert refused.exit_code == 1
    assert "can't convert sessions.sender_id in the row with session_id 's-1'" in refused.stderr
    assert rows_of(file) == before
    change(file, f"UPDATE sessions SET sender_id = '{sender}'")
    assert init(file, "--yes").exit_code == 0
    done = init(file, "--yes", "--migrations", folder)
    assert "Application id" not in done.stdout
    (backup,) = re.findall(r"A copy from before is in (\S+\.backup)\.", done.stdout)
    assert fetch(Path(backup), "SELECT version_num FROM alembic_version") == [("a1",)]
    assert fetch(file, "SELECT version_num FROM application_schema_version") == [("a2",)]


def test_overlapping_revisions(file: Path, folder: Path) -> None:
    """If the version table also has the predecessor of a revision, the error names both revisions."""
    change(file, "INSERT INTO alembic_version VALUES ('a2')")
    refused = init(file, "--yes", "--migrations", folder)
    assert refused.exit_code == 1
    assert re.search(r"the revisions of \S+: RevisionError: .*a\d overlaps with .*a\d", refused.stderr)


REFUSED: dict[str, tuple[str, type[DatabaseError]]] = {
    "table sessions in .* other columns": ("ALTER TABLE sessions ADD COLUMN own TEXT", DatabaseError),
    "trigger audit of devices is not homeagent's": (
        "CREATE TRIGGER audit AFTER INSERT ON devices BEGIN SELECT 1; END",
        DatabaseError,
    ),
    "application's view counts, which": ("CREATE VIEW counts AS SELECT count(*) FROM nonces", DatabaseError),
    "needs the name of the application's table store": ("CREATE TABLE store (id)", DatabaseError),
    "application's table nonces_without_key: give .* another name": (
        "CREATE TABLE nonces_without_key (id)",
        DatabaseError,
    ),
    "1 rows of sessions in .* refer to rows of agents": ("DELETE FROM agents", ForeignDatabaseError),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_prevents_an_adoption_is_named(file: Path, problem: str) -> None:
    """An object or a row that prevents the adoption is named before the question, and no file changes."""
    statement, kind = REFUSED[problem]
    change(file, f"PRAGMA foreign_keys=OFF; {statement}")
    before = snapshot(file.parent)
    with pytest.raises(kind, match=problem):
        preview_adoption(Target(file), NO_REVISIONS)
    assert init(file, "--yes").exit_code == 1
    assert snapshot(file.parent) == before


def test_utf_16(tmp_path: Path) -> None:
    """A file with UTF-16 texts is refused, because homeagent's order and limits of texts are of UTF-8 bytes."""
    path = tmp_path / "hub.db"
    change(path, "PRAGMA encoding = 'UTF-16'; CREATE TABLE own (name TEXT)")
    before = snapshot(tmp_path)
    with pytest.raises(ForeignDatabaseError, match=r"are in UTF-16.*\.dump"):
        preview_adoption(Target(path), NO_REVISIONS)
    assert init(path, "--yes").exit_code == 1
    assert snapshot(tmp_path) == before


CHANGES = {
    "has changed since the report": "INSERT INTO notes VALUES (2, NULL, 'new')",
    "another program has .* open|locked by another process": "BEGIN IMMEDIATE",
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_file_in_use(file: Path, problem: str) -> None:
    """If another program changes or locks the file after the report, nothing is adopted."""
    report = preview_adoption(Target(file), NO_REVISIONS)
    assert report is not None
    program = "import sqlite3, sys; raw = sqlite3.connect(sys.argv[1], isolation_level=None); raw.execute(sys.argv[2])"
    hold = "; print('ready', flush=True); sys.stdin.read()"
    with fork_server.Child(program + hold, file, CHANGES[problem]) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(DatabaseBusyError, match=problem):
            adopt(Target(file), report, NO_REVISIONS)
        other.communicate("")
    assert fetch(file, "PRAGMA application_id") == [(0,)]
    assert fetch(file, "SELECT count(*) FROM devices") == [(3,)]


def test_postgresql(empty_postgres_url: str, folder: Path) -> None:
    """On PostgreSQL the version table of Alembic becomes the application's, and only missing revisions run."""
    postgres_execute(empty_postgres_url, "CREATE TABLE notes (id INTEGER PRIMARY KEY)")
    postgres_execute(empty_postgres_url, "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)")
    postgres_execute(empty_postgres_url, "INSERT INTO alembic_version VALUES ('a1')")
    refused = init(empty_postgres_url, "--migrations", folder, answer="n\n")
    assert "notes (0 rows)" in refused.stderr
    assert "from alembic_version: a1" in refused.stderr
    assert init(empty_postgres_url, "--migrations", folder, "--yes").exit_code == 0
    Database.open(empty_postgres_url, migrations=folder, migrate=False).close()
    postgres_execute(empty_postgres_url, "SELECT stars FROM notes")
    assert "nothing to do" in init(empty_postgres_url, "--migrations", folder).stdout


@pytest.mark.parametrize("step", [120, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_statement(file: Path, tmp_path: Path, step: int) -> None:
    """If the adoption is killed at any statement, the old or the new file is there, and the next one succeeds."""
    before = "report = preview_adoption(Target(path), Application(adopts=True))"
    action = "adopt(Target(path), report, Application(adopts=True))"
    paths = killed_at_statements(file, tmp_path, step, action, before=before)
    assert len(paths) * step > 60
    found, content = [], rows_of(file)
    for path in paths:
        is_adopted = fetch(path, "PRAGMA application_id") != [(0,)]
        found.append(is_adopted)
        assert is_adopted or rows_of(path) == content
        again = init(path, "--yes")
        assert again.exit_code == 0, again.output
        with Database.open(path) as database:
            assert database.status().schema_revision == REVISION
        assert fetch(path, "SELECT count(*) FROM devices_without_key") == [(2,)]
        assert is_sound(path)
    assert found == sorted(found)
    assert set(found) == {False, True}
