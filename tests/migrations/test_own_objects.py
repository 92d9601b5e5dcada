"""Upgrades of homeagent's tables in a database with an application's tables, indexes, views and triggers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Database
from homeagent.errors import MigrationError
from homeagent.migrations import REVISION, revisions
from tests.migrations.old_databases import (
    REVISIONS,
    change,
    clock,
    fetch,
    few,
    is_sound,
    old_database,
    plain_engine,
    rows_of,
    sqlite,
)

OLD = REVISIONS[: REVISIONS.index(REVISION)]
COLUMNS = {"devices": "id", "agents": "name", "sessions": "sender_id", "nonces": "nonce", "idempotency_keys": "method"}
TRIGGERS = [f"own_deletion_of_{table}" for table in COLUMNS]
NOTES = (
    "CREATE TABLE own_notes (id INTEGER PRIMARY KEY, device_id TEXT REFERENCES devices ON DELETE CASCADE,"
    " agent_id TEXT REFERENCES agents (id) ON DELETE CASCADE,"
    " session_id TEXT REFERENCES sessions (session_id) ON DELETE CASCADE)"
)
ROWS = (
    "INSERT INTO own_notes SELECT 1, id, NULL, NULL FROM devices WHERE id = 'phone'",
    "INSERT INTO own_notes SELECT 2, NULL, min(id), NULL FROM agents",
    "INSERT INTO own_notes SELECT 3, NULL, NULL, min(session_id) FROM sessions",
)
KEPT = [
    NOTES,
    *ROWS,
    "CREATE TABLE own_log (what TEXT)",
    "CREATE VIRTUAL TABLE own_search USING fts5 (words)",
    "CREATE VIEW own_view AS SELECT * FROM own_notes LEFT JOIN devices ON devices.id = device_id",
    "CREATE TRIGGER own_reader AFTER INSERT ON own_notes WHEN new.device_id NOT IN (SELECT id FROM devices)"
    " BEGIN SELECT raise(ABORT, 'no such device'); END",
]
for _table, _column in COLUMNS.items():
    KEPT += [
        f"ALTER TABLE {_table} ADD COLUMN own_mark TEXT COLLATE NOCASE DEFAULT 'a (big) hall'",
        f"CREATE INDEX own_order_{_table} ON {_table} ({_column} COLLATE NOCASE DESC, own_mark)",
        f"CREATE INDEX own_expression_{_table} ON {_table} (lower({_column})) WHERE {_column} > 'a'",
        f"CREATE TRIGGER own_deletion_of_{_table} AFTER DELETE ON {_table}"
        f" BEGIN INSERT INTO own_log VALUES ('{_table}'); END",
    ]


def own_objects(path: Path) -> list[Any]:
    """Return the application's objects with their SQL."""
    return fetch(path, "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name LIKE 'own%' ORDER BY name")


# Alembic's batch mode does not know that homeagent creates the index again.
@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
@pytest.mark.parametrize("revision", few(OLD[0], "0005", OLD[-1], of=OLD))
def test_own_objects_are_kept(tmp_path: Path, revision: str) -> None:
    """Each upgrade of a file keeps the application's rows, columns, indexes, views and acknowledged triggers."""
    path = old_database(tmp_path, revision)
    change(path, *KEPT)
    if revision == "0005":  # 0006 rebuilds the table with its generated columns
        change(path, "ALTER TABLE devices ADD COLUMN own_loud TEXT GENERATED ALWAYS AS (upper(id)) VIRTUAL")
    before, objects = rows_of(path), own_objects(path)
    Database.open(path, clock=clock, acknowledged=TRIGGERS).close()
    after = rows_of(path)
    assert own_objects(path) == objects
    assert {table: after[table] for table in before if table.startswith("own")} == {
        table: rows for table, rows in before.items() if table.startswith("own")
    }
    for table in COLUMNS:
        assert [row["own_mark"] for row in after[table]] == ["a (big) hall"] * len(before[table])
    assert is_sound(path)
    with closing(sqlite(path)) as raw:
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute("DELETE FROM devices WHERE id = 'phone'")
        assert raw.execute("SELECT count(*) FROM own_notes WHERE device_id = 'phone'").fetchone() == (0,)
        raw.execute("DELETE FROM nonces")
        assert {row[0] for row in raw.execute("SELECT what FROM own_log").fetchall()} >= {"devices", "nonces"}


REFUSED = {
    "view own_counts": ["CREATE VIEW own_counts AS SELECT device_id, count(*) FROM idempotency_keys GROUP BY 1"],
    "trigger own_reader": [
        "CREATE TABLE own_log (what TEXT)",
        "CREATE TRIGGER own_reader AFTER INSERT ON own_log BEGIN SELECT * FROM nonces; END",
    ],
    "generated column own_loud": ["ALTER TABLE nonces ADD COLUMN own_loud TEXT GENERATED ALWAYS AS (upper(nonce))"],
    "index idx_devices_pending": [
        "CREATE TABLE own_log (what TEXT)",
        "CREATE INDEX idx_devices_pending ON own_log (what)",
    ],
    "table device_changes": ["CREATE TABLE device_changes (what TEXT)"],
}


@pytest.mark.parametrize("named", REFUSED)
def test_objects_that_prevent_an_upgrade(tmp_path: Path, named: str) -> None:
    """If an upgrade would break an object of the application, the error names the object, and no byte changes."""
    path = old_database(tmp_path, "0001")
    change(path, "PRAGMA journal_mode=WAL", "CREATE VIRTUAL TABLE own_search USING fts5 (words)", *REFUSED[named])
    before = path.read_bytes()
    with pytest.raises(MigrationError, match=rf"application's {named}\b.*: (drop|give) the .* Nothing was changed"):
        Database.open(path, clock=clock)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.backup"))


@pytest.mark.parametrize("revision", few(OLD[0], OLD[-1], of=OLD))
def test_own_objects_are_kept_on_postgresql(empty_postgres_url: str, revision: str) -> None:
    """Each upgrade on PostgreSQL keeps the application's rows, indexes, views, triggers and references."""
    queries = (
        "SELECT * FROM own_notes ORDER BY id",
        "SELECT * FROM own_view ORDER BY id",
        "SELECT indexname, indexdef FROM pg_indexes WHERE indexname LIKE 'own%' ORDER BY 1",
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'own%' ORDER BY 1",
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conname LIKE 'own%fk%' ORDER BY 1",
    )
    engine = plain_engine(empty_postgres_url)
    with engine.begin() as connection:
        revisions.upgrade(connection, revision)
        for statement in (
            "INSERT INTO agents VALUES ('ada', 'Ada', '/srv', 1, NULL)",
            "INSERT INTO devices (id, role, shared_secret_hash, paired_at) VALUES ('phone', 'client', 'h', 1)",
            "INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s-1', 'ada', 1, 1)",
            NOTES,
            *ROWS,
            # Run the deferred triggers of revision 0009, which would prevent the new indexes.
            "SET CONSTRAINTS ALL IMMEDIATE",
            "CREATE VIEW own_view AS SELECT own_notes.id, role FROM own_notes LEFT JOIN devices"
            " ON devices.id = device_id",
            *(f"CREATE INDEX own_{table} ON {table} (lower({column}))" for table, column in COLUMNS.items()),
            *(
                f"CREATE TRIGGER own_{table} BEFORE UPDATE ON {table} FOR EACH ROW"
                " EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                for table in ("own_notes", *COLUMNS)
            ),
        ):
            connection.execute(text(statement))
        before = [connection.execute(text(query)).all() for query in queries]
    Database.open(empty_postgres_url, acknowledged=[f"own_{table}" for table in COLUMNS]).close()
    with engine.connect() as connection:
        assert [connection.execute(text(query)).all() for query in queries] == before
