"""A manual schema change is refused before its rows are trusted; the application's own tables are accepted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from homeagent import Database, DevicePair, Role, diagnose
from homeagent.errors import SchemaChangedError
from homeagent.maintenance import Finding
from homeagent.migrations import REVISION, VERSION_TABLE, revisions
from tests.conftest import FakeClock, add_device
from tests.engine.files.conftest import snapshot
from tests.migrations.old_databases import REVISIONS, change, fetch, old_database, plain_engine
from tests.migrations.old_databases import clock as then

APPROVES = "BEGIN UPDATE devices SET approved = 1, role = 'admin'; END"

# The manual change, and its name in the error. Each is possible at every revision.
CHANGES = {
    "trigger": (f"CREATE TRIGGER z AFTER INSERT ON devices {APPROVES}", "trigger z of devices"),
    "trigger in other letters": (f"CREATE TRIGGER z AFTER INSERT ON [Devices] {APPROVES}", "trigger z of devices"),
    "trigger of the version": (f"CREATE TRIGGER z AFTER UPDATE ON {VERSION_TABLE} {APPROVES}", "trigger z"),
    "trigger of another table": (f"CREATE TRIGGER z AFTER INSERT ON rooms {APPROVES}", "trigger z of rooms"),
    "trigger of one column": (
        'CREATE TRIGGER z BEFORE UPDATE OF size ON rooms WHEN 0 BEGIN DELETE FROM "nonces"; END',
        "trigger z of rooms",
    ),
    "trigger of a view": (
        "CREATE VIEW large AS SELECT id FROM rooms;"
        " CREATE TRIGGER z INSTEAD OF DELETE ON large BEGIN INSERT OR REPLACE INTO agents SELECT * FROM agents; END",
        "trigger z of large",
    ),
    "trigger with a function of the application": (
        "CREATE TRIGGER z AFTER INSERT ON rooms BEGIN SELECT theirs(NEW.id); UPDATE devices SET approved = 1; END",
        "trigger z of rooms",
    ),
    "trigger with an odd name": (f'CREATE TRIGGER "z ""1" AFTER INSERT ON devices {APPROVES}', 'z "1'),
}
# Changes that neither alter nor refuse a row: the doctor names them, and every operation still works.
HARMLESS = {
    "view": "CREATE VIEW z AS SELECT rooms.id FROM rooms JOIN devices",
    "view without a column": "CREATE VIEW z AS SELECT (SELECT count(*) FROM devices)",
    "index": "CREATE INDEX z ON devices (role)",
    "index dropped": "DROP INDEX idx_sessions_agent",
    "column": "ALTER TABLE devices ADD COLUMN z TEXT",
}
ROOMS = "CREATE TABLE rooms (id INTEGER PRIMARY KEY, size INTEGER, twice INTEGER AS (size * 2));"

# The application's own objects: these objects refer to homeagent's tables, but do not change the tables.
APPLICATION = (
    ROOMS + "CREATE TABLE messages (id INTEGER PRIMARY KEY, session_id TEXT REFERENCES sessions, devices INTEGER);"
    "CREATE UNIQUE INDEX idx_messages ON messages (session_id);"
    "CREATE VIEW recent AS SELECT id, devices FROM messages;"
    "CREATE TRIGGER counts AFTER INSERT ON messages BEGIN"
    " UPDATE messages SET devices = (SELECT count(*) FROM devices) WHERE id = NEW.id; END;"
    "CREATE TRIGGER logs INSTEAD OF INSERT ON recent BEGIN INSERT INTO rooms (size) VALUES ('devices'); END;"
)


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_schema_is_refused(sqlite_path: Path, tmp_path: Path, kind: str) -> None:
    """A backup or an old file with a changed schema is neither restored nor upgraded, and no database changes."""
    (tmp_path / "old").mkdir(mode=0o700)
    statements, named = CHANGES[kind]
    backup, old = tmp_path / "the.backup", old_database(tmp_path / "old", "0001")
    shutil.copyfile(sqlite_path, backup)
    for file, target, attempt in (
        (backup, sqlite_path, lambda: Database.restore(backup, sqlite_path)),
        (old, old, lambda: Database.open(old, clock=then)),
    ):
        change(file, ROOMS + statements)
        before = {name: entry[-1] for name, entry in snapshot(target.parent).items()}
        with pytest.raises(SchemaChangedError) as caught:
            attempt()
        assert len(caught.value.changes) == 1
        assert named in caught.value.changes[0].replace('""', '"')
        assert str(file) in str(caught.value)
        after = {name: entry[-1] for name, entry in snapshot(target.parent).items()}
        assert {name: after[name] for name in after if not name.endswith((".lock", ".open"))} == before


def test_remedy_of_a_refused_restore(sqlite_path: Path, tmp_path: Path) -> None:
    """After the statement from the error was run on a copy of the backup, the copy can be restored."""
    change(sqlite_path, CHANGES["trigger"][0])
    with Database.open(sqlite_path) as database:
        database_backup = database.backup(tmp_path / "the.backup")
    with pytest.raises(SchemaChangedError, match="restore the copy") as caught:
        Database.restore(database_backup, sqlite_path)
    mended = tmp_path / "mended.backup"
    shutil.copyfile(database_backup, mended)
    remedy = str(caught.value)
    change(mended, remedy[remedy.index("DROP TRIGGER") :].partition(")")[0])
    Database.restore(mended, sqlite_path)
    with Database.open(sqlite_path) as database:
        secret = database.pair(DevicePair(id="new", role=Role.CLIENT)).shared_secret
        assert database.verify_secret("new", secret) is None


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_change_is_accepted(sqlite_path: Path, tmp_path: Path, kind: str) -> None:
    """A view, a plain index or an additional column prevents neither a restore nor an upgrade."""
    backup = old_database(tmp_path, "0005")
    change(backup, ROOMS + HARMLESS[kind])
    Database.restore(backup, sqlite_path)
    Database.open(sqlite_path).close()


@pytest.mark.parametrize("revision", REVISIONS)
def test_tables_of_the_application_are_kept(tmp_path: Path, sqlite_path: Path, revision: str) -> None:
    """Objects of the application are kept by upgrades and restores from each revision; a foreign trigger is refused."""
    path = old_database(tmp_path, revision)
    change(path, APPLICATION)
    query = "SELECT type, name, sql FROM sqlite_master WHERE tbl_name IN ('rooms', 'messages', 'recent') ORDER BY 2"
    made = fetch(path, query)
    assert len(made) == 6
    changed = shutil.copyfile(path, tmp_path / "changed.backup")
    change(changed, CHANGES["trigger"][0])
    with pytest.raises(SchemaChangedError):
        Database.restore(changed, sqlite_path)
    assert Database.restore(path, sqlite_path).upgraded_from == (None if revision == REVISION else revision)
    Database.open(path, clock=then).close()
    assert fetch(path, query) == fetch(sqlite_path, query) == made
    assert finding(sqlite_path).severity == "ok"


def test_spelling_of_a_definition_is_ignored(sqlite_path: Path) -> None:
    """Comments, spaces and quotes of names do not count as changes, but differences inside a text do."""
    change(
        sqlite_path,
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_master SET sql = replace(sql, ', ', ', -- app''s\n ') || ' /* app:web */'",
        "UPDATE sqlite_master SET sql = replace(sql, 'role TEXT', '\"role\"  TEXT') WHERE name = 'devices'",
    )
    assert finding(sqlite_path).severity == "ok"
    statement = "UPDATE sqlite_master SET sql = replace(sql, '''admin''', '''/**/admin''') WHERE name = 'devices'"
    change(sqlite_path, "PRAGMA writable_schema=ON", statement)
    assert "ck_devices_role" in finding(sqlite_path).summary


def finding(path: Path) -> Finding:
    """Return the doctor's finding about the schema of a file."""
    (found,) = [finding for finding in diagnose(path).findings if finding.check == "schema"]
    return found


SERVER_CHANGES = {
    "trigger": [
        "CREATE FUNCTION z() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.approved = 1; RETURN NEW; END'",
        "CREATE TRIGGER z BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION z()",
    ],
    "rule": ["CREATE RULE z AS ON UPDATE TO devices DO INSTEAD NOTHING"],
}


@pytest.mark.parametrize("kind", SERVER_CHANGES)
def test_changed_schema_on_postgresql(empty_postgres_url: str, clock: FakeClock, kind: str) -> None:
    """On PostgreSQL a trigger or rule on homeagent's tables prevents an upgrade until it is dropped."""
    engine = plain_engine(empty_postgres_url)
    with engine.begin() as connection:
        revisions.upgrade(connection, "0004")
        for statement in SERVER_CHANGES[kind]:
            connection.execute(text(statement))
    with pytest.raises(SchemaChangedError, match=f"{kind} z of devices") as caught:
        Database.open(empty_postgres_url)
    remedy = str(caught.value)
    with engine.begin() as connection:
        assert connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).all() == [("0004",)]
        connection.execute(text(remedy[remedy.index(f"DROP {kind.upper()}") :].partition(")")[0]))
    with Database.open(empty_postgres_url, clock=clock) as database:
        assert not add_device(database).approved
