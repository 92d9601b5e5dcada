"""The schema's history: what each revision makes, what becomes of old rows, and upgrades that fail, race or die.

What is on SQLite only is about files: those kept of each release, the copy before an upgrade, the rebuilding of tables.
The revisions themselves run on both; postgresql/test_upgrade.py has the locks and timeouts of the other.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, inspect, make_url, text
from sqlalchemy.pool import NullPool

import homeagent
from alembic import command
from homeagent import AgentCreate, Database, IdempotencyScope, IdempotencyState
from homeagent.engine.disk.files import create_file
from homeagent.engine.sqlite.driver import choose_driver
from homeagent.engine.sqlite.engine import APPLICATION_ID, SQLiteEngine
from homeagent.errors import (
    IdempotencyKeyExistsError,
    MigrationError,
    SchemaOutdatedError,
)
from homeagent.migrations import REVISION, VERSION_TABLE, alembic_config, revisions
from homeagent.migrations import postgresql as postgresql_migrations
from homeagent.migrations import sqlite as sqlite_migrations
from homeagent.models import DATA_TABLES, metadata
from homeagent.models.session import route_key
from tests.conftest import postgres_database, postgres_execute

CHECKOUT = Path(homeagent.__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
RECIPE: dict[str, Any] = runpy.run_path(str(FIXTURES / "make_revisions.py"))
REVISIONS: tuple[str, ...] = RECIPE["REVISIONS"]
NOW = datetime.fromtimestamp(RECIPE["NOW"] // 1000, UTC)

Rows = dict[str, list[dict[str, Any]]]


def clock() -> datetime:
    """Return the instant at which the fixtures' rows are read."""
    return NOW


def sqlite(path: Path) -> Any:
    """Return a bare connection, through the library that the package itself uses in this process."""
    return choose_driver().module.connect(str(path), isolation_level=None)


def fetch(path: Path, query: str) -> list[Any]:
    """Return the rows of a query on a file that nobody has open."""
    with closing(sqlite(path)) as raw:
        return list(raw.execute(query).fetchall())


def old_database(directory: Path, revision: str) -> Path:
    """Return a private copy of the database of this revision."""
    path = directory / "homeagent.db"
    shutil.copyfile(FIXTURES / "revisions" / f"{revision}.db", path)
    path.chmod(0o600)
    return path


def upgrade(path: Path, revision: str) -> None:
    """Make a file, or take one, and bring it to a revision by the real upgrade."""
    create_file(path)
    engine = SQLiteEngine(path, busy_timeout=timedelta(0), durability="normal")
    engine.prepare_header()
    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            command.upgrade(alembic_config(connection), revision)
    engine.close()


def rows_of(path: Path) -> Rows:
    """Return every row of every table, in a fixed order, NULL columns left out."""
    with closing(sqlite(path)) as raw:
        tables = [row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        found: Rows = {}
        for table in tables:
            cursor = raw.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in cursor.description]
            found[table] = sorted(
                ({n: v for n, v in zip(names, row, strict=True) if v is not None} for row in cursor.fetchall()),
                key=lambda row: json.dumps(row, sort_keys=True),
            )
    return found


def is_sound(path: Path) -> bool:
    """Tell whether SQLite finds neither damage nor a broken reference."""
    with closing(sqlite(path)) as raw:
        damage = raw.execute("PRAGMA integrity_check").fetchall()
        return damage == [("ok",)] and not raw.execute("PRAGMA foreign_key_check").fetchall()


def server(url: str) -> Engine:
    """Return SQLAlchemy's own engine on a PostgreSQL database."""
    return create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)


# What a schema is, in full


def _normal(sql: str) -> str:
    return re.sub(r"\s+", " ", sql.replace('"', "")).strip()


def sqlite_structure(raw: Any) -> dict[str, Any]:
    """Describe a SQLite schema: whatever two files must share to behave alike, the texts of CHECKs included."""
    structure: dict[str, Any] = {}
    names = [
        row[0]
        for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        if row[0] != VERSION_TABLE
    ]
    others = raw.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchall()
    structure["triggers and views"] = others
    for table in names:
        sql = _normal(raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", [table]).fetchone()[0])
        body, options = re.fullmatch(r"CREATE TABLE \w+ \((.*)\)([^)]*)", sql).groups()  # type: ignore[union-attr]  # it matches
        indexes = {}
        for _, index, unique, origin, partial in raw.execute(f"PRAGMA index_list({table})").fetchall():
            columns = [tuple(row[2:]) for row in raw.execute(f"PRAGMA index_xinfo({index})").fetchall()]
            written = raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", [index]).fetchone()
            where = _normal(written[0]).partition(" WHERE ")[2] if origin == "c" else ""
            indexes[index if origin == "c" else origin] = (unique, partial, columns, where)
        structure[table] = {
            "options": options.strip(),
            # Name, declared type, NOT NULL, default, place in the primary key, hidden or generated.
            "columns": [tuple(row[1:]) for row in raw.execute(f"PRAGMA table_xinfo({table})").fetchall()],
            # What no pragma tells: collations, and CONSTRAINT … CHECK (…) word for word.
            "clauses": sorted(part.strip() for part in re.split(r", (?![^(]*\))", body)),
            "foreign keys": [tuple(row[2:]) for row in raw.execute(f"PRAGMA foreign_key_list({table})").fetchall()],
            "indexes": indexes,
        }
    return structure


def postgresql_structure(connection: Connection) -> dict[str, Any]:
    """Describe a PostgreSQL schema, as its own catalogue writes it down."""
    columns = connection.execute(
        text(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name"
            " FROM information_schema.columns WHERE table_schema = current_schema()"
        )
    )
    constraints = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = current_schema()::regnamespace AND contype <> 'n'"
        )
    )
    indexes = connection.execute(
        text("SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()")
    )
    return {
        kind: sorted(tuple(map(str, row)) for row in found if not str(row[0]).endswith(VERSION_TABLE))
        for kind, found in (("columns", columns), ("constraints", constraints), ("indexes", indexes))
    }


# The models and the revisions are one schema


def alembic_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Alembic's own command line in the checkout, as a contributor does."""
    known = {name: value for name, value in os.environ.items() if name != "HOMEAGENT_DATABASE"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "alembic.config", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**known, **environment},
        timeout=120,
    )


def test_alembic_check_on_sqlite() -> None:
    """`alembic check` in a checkout compares the models with a scratch database, and finds nothing to do."""
    done = alembic_cli("check")
    assert (done.returncode, "No new upgrade operations detected" in done.stdout) == (0, True), (
        done.stdout + done.stderr
    )


def test_alembic_check_on_an_old_file(tmp_path: Path) -> None:
    """`alembic check` says so where the database that is named has not been upgraded: the check above can fail."""
    path = old_database(tmp_path, "0003")
    before = path.read_bytes()
    done = alembic_cli("check", HOMEAGENT_DATABASE=str(path))
    assert done.returncode != 0
    assert "not up to date" in done.stdout + done.stderr
    assert path.read_bytes() == before


def test_alembic_check_on_postgresql(empty_postgres_url: str) -> None:
    """`alembic check` finds nothing to do on an upgraded PostgreSQL database, a host application's tables in it too."""
    Database.open(empty_postgres_url).close()
    with server(empty_postgres_url).begin() as connection:
        connection.execute(text("CREATE TABLE a_host_application (id integer PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)"))
    done = alembic_cli("check", HOMEAGENT_DATABASE=empty_postgres_url)
    assert (done.returncode, "No new upgrade operations detected" in done.stdout) == (0, True), (
        done.stdout + done.stderr
    )


def test_autogenerate_drafts_plain_types(tmp_path: Path) -> None:
    """A drafted revision holds plain `sa.` types alone, whatever columns of ours are in it."""
    copy = tmp_path / "alembic"
    shutil.copytree(CHECKOUT / "alembic", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for revision in ("0003", "0004", "0005"):
        next(copy.glob(f"versions/{revision}_*")).unlink()
    configuration = tmp_path / "alembic.ini"
    configuration.write_text(f"[alembic]\nscript_location = {copy}\n")
    done = alembic_cli("-c", str(configuration), "revision", "--autogenerate", "--rev-id", "0003", "-m", "draft")
    assert done.returncode == 0, done.stdout + done.stderr
    draft = (copy / "versions" / "0003_draft.py").read_text()
    assert "sa.Column('approved_at', sa.BigInteger().with_variant(sa.Integer(), \"sqlite\")" in draft
    assert "idx_sessions_route" in draft
    assert "homeagent" not in draft


def test_sqlite_schema_is_the_models(tmp_path: Path) -> None:
    """The upgraded schema is to the letter what the models would create: types, defaults, CHECKs, indexes, options."""
    migrated, created = tmp_path / "migrated.db", tmp_path / "created.db"
    Database.open(migrated).close()
    create_file(created)
    engine = SQLiteEngine(created, busy_timeout=timedelta(0), durability="normal")
    with engine.connect() as connection, connection.begin():
        metadata.create_all(connection)
    engine.close()
    with closing(sqlite(migrated)) as upgraded, closing(sqlite(created)) as model:
        structure = sqlite_structure(upgraded)
        assert structure == sqlite_structure(model)
    assert "CONSTRAINT ck_devices_role CHECK (role IN ('client', 'node', 'admin'))" in structure["devices"]["clauses"]
    assert structure["idempotency_keys"]["indexes"]["idx_idempotency_lease"][3] == "state = 'in_progress'"
    assert structure["nonces"]["options"] == "WITHOUT ROWID"


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("'node', 'admin'", "'node', 'root'"),
        ("state = 'in_progress'", "state = 'failed'"),
        ("WITHOUT ROWID", ""),
        ("DEFAULT 0", "DEFAULT 1"),
        ("paired_at INTEGER", "paired_at BIGINT"),
        ("ck_idempotency_keys_state", "ck_state"),
        ("(expires_at)", "(created_at)"),
        ("name TEXT NOT NULL", "name TEXT NOT NULL COLLATE NOCASE"),
        ("REFERENCES agents (id)", "REFERENCES agents (id) ON DELETE CASCADE"),
        ("config TEXT", "config TEXT NOT NULL"),
    ],
)
def test_structure_notices(tmp_path: Path, there: str, instead: str) -> None:
    """The comparison of two schemas notices each kind of change, so that equality means something."""
    Database.open(tmp_path / "homeagent.db").close()
    with closing(sqlite(tmp_path / "homeagent.db")) as raw:
        sound = sqlite_structure(raw)
        statements = [_normal(row[0]) for row in raw.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
    assert any(there in statement for statement in statements)
    with closing(choose_driver().module.connect(":memory:")) as changed:
        for statement in statements:
            changed.execute(statement.replace(there, instead))
        assert sqlite_structure(changed) != sound


def test_postgresql_schema_is_the_models(empty_postgres_url: str) -> None:
    """On PostgreSQL, too, the upgraded schema is what the models would create, collations included."""
    Database.open(empty_postgres_url).close()
    engine = server(empty_postgres_url)
    with engine.begin() as connection:
        migrated = postgresql_structure(connection)
        for schema in ("public",):
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
            connection.execute(text(f"CREATE SCHEMA {schema}"))
        metadata.create_all(connection)
        assert migrated == postgresql_structure(connection)
    assert any("'C'" in str(row) or row[5] == "C" for row in migrated["columns"])


# What a revision is can't change any more


SPECIFICATION = """
    CREATE TABLE devices (
      id TEXT PRIMARY KEY,
      role TEXT NOT NULL CHECK(role IN ('client', 'node', 'admin')),
      shared_secret_hash TEXT NOT NULL,
      approved INTEGER NOT NULL DEFAULT 0,
      paired_at INTEGER NOT NULL,
      last_seen_at INTEGER,
      metadata TEXT
    );
    CREATE TABLE agents (
      id TEXT PRIMARY KEY,
      name TEXT NOT NULL,
      workspace_path TEXT NOT NULL,
      created_at INTEGER NOT NULL,
      config TEXT
    );
    CREATE TABLE sessions (
      session_id TEXT PRIMARY KEY,
      agent_id TEXT NOT NULL REFERENCES agents(id),
      sender_id TEXT,
      channel_id TEXT,
      created_at INTEGER NOT NULL,
      last_active_at INTEGER NOT NULL
    );
    CREATE INDEX idx_sessions_agent ON sessions(agent_id);
    CREATE INDEX idx_sessions_sender ON sessions(sender_id);
    CREATE TABLE nonces (
      nonce TEXT PRIMARY KEY,
      device_id TEXT NOT NULL,
      created_at INTEGER NOT NULL,
      expires_at INTEGER NOT NULL
    );
    CREATE INDEX idx_nonces_expires ON nonces(expires_at);
    CREATE TABLE idempotency_keys (
      key TEXT PRIMARY KEY,
      method TEXT NOT NULL,
      device_id TEXT NOT NULL,
      result TEXT NOT NULL,
      created_at INTEGER NOT NULL,
      expires_at INTEGER NOT NULL
    );
    CREATE INDEX idx_idempotency_expires ON idempotency_keys(expires_at);
"""


def test_first_revision_is_the_specification(tmp_path: Path) -> None:
    """Revision 0001 makes the tables of the specification: names, types, defaults, keys, reference, four indexes."""

    def promised(raw: Any) -> dict[str, Any]:
        structure = sqlite_structure(raw)
        del structure["triggers and views"]
        for table in structure.values():
            # The specification names no constraint, and its keys are NOT NULL only by being keys.
            del table["clauses"], table["options"]
            table["columns"] = [(*row[:2], row[2] or row[4], *row[3:]) for row in table["columns"]]
        return structure

    upgrade(tmp_path / "first.db", "0001")
    with (
        closing(sqlite(tmp_path / "first.db")) as first,
        closing(choose_driver().module.connect(":memory:")) as written,
    ):
        written.executescript(SPECIFICATION)
        assert promised(first) == promised(written)
        checks = [clause for clause in sqlite_structure(first)["devices"]["clauses"] if "CHECK" in clause]
        assert checks == ["CONSTRAINT ck_devices_role CHECK (role IN ('client', 'node', 'admin'))"]
        names = {row[0] for row in first.execute("SELECT name FROM sqlite_master WHERE name LIKE 'idx%'")}
    assert names == {"idx_sessions_agent", "idx_sessions_sender", "idx_nonces_expires", "idx_idempotency_expires"}


@pytest.mark.parametrize("revision", REVISIONS)
def test_released_revision_is_unchanged(tmp_path: Path, revision: str) -> None:
    """A revision still makes what it made when it was released: the schema of the database that was kept."""
    upgrade(tmp_path / "now.db", revision)
    kept = old_database(tmp_path, revision)
    assert fetch(kept, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert fetch(kept, "PRAGMA journal_mode") == [("delete",)]
    assert fetch(kept, f"SELECT version_num FROM {VERSION_TABLE}") == [(revision,)]
    with closing(sqlite(tmp_path / "now.db")) as now, closing(sqlite(kept)) as then:
        assert sqlite_structure(now) == sqlite_structure(then)


def test_every_revision_has_a_fixture() -> None:
    """Each revision has a database that is kept, and the newest one is the one that the package works with."""
    scripts = sorted(path.name[:4] for path in (CHECKOUT / "alembic" / "versions").glob("*.py"))
    assert scripts == list(REVISIONS)
    assert scripts == sorted(path.stem for path in (FIXTURES / "revisions").glob("*.db"))
    assert scripts[-1] == REVISION


# Old rows


def test_keys_per_device_keep_rows(tmp_path: Path) -> None:
    """0002 keeps every row and then takes one nonce of two devices, and one key of two methods, but no twin."""
    path = old_database(tmp_path, "0001")
    before = rows_of(path)
    upgrade(path, "0002")
    after = rows_of(path)
    assert after.pop(VERSION_TABLE) == [{"version_num": "0002"}]
    assert before.pop(VERSION_TABLE) == [{"version_num": "0001"}]
    assert after == before
    with closing(sqlite(path)) as raw:
        raw.execute("INSERT INTO nonces VALUES ('nonce-1', 'admin', 1, 2)")
        raw.execute("INSERT INTO idempotency_keys SELECT key, 'other', device_id, result, 1, 2 FROM idempotency_keys")
        for twin in (
            "INSERT INTO nonces VALUES ('nonce-1', 'phone', 1, 2)",
            "INSERT INTO idempotency_keys VALUES ('key-1', 'door.open', 'phone', '1', 1, 2)",
        ):
            with pytest.raises(choose_driver().module.IntegrityError, match="UNIQUE"):
                raw.execute(twin)


def test_most_recent_session_takes_the_route(tmp_path: Path) -> None:
    """0003 gives each route to its most recent session, equal instants to the higher id; the others stay without."""
    path = old_database(tmp_path, "0002")
    upgrade(path, "0003")
    routes = dict(fetch(path, "SELECT session_id, route_key FROM sessions"))
    assert routes == {
        "s-1": None,
        "s-2": route_key("kitchen", "alice", "signal"),
        "s-3": None,
        "s-4": None,
        "s-5": route_key("kitchen", None, None),
        "s-6": route_key("kitchen", "alice", None),
        "s-7": route_key("büro-日本", "alice", "signal"),
        "s-8": route_key("büro-日本", "Zoë 🐈", 'a","b'),
    }


def test_old_results_count_as_completed(tmp_path: Path) -> None:
    """0004 takes a stored result for a completed first attempt, without owner, lease or fingerprint."""
    path = old_database(tmp_path, "0003")
    results = fetch(path, "SELECT device_id, method, key, result FROM idempotency_keys ORDER BY 1, 2, 3")
    upgrade(path, "0004")
    assert fetch(path, "SELECT device_id, method, key, result FROM idempotency_keys ORDER BY 1, 2, 3") == results
    states = "state, attempt, omitted, owner, lease_expires_at, fingerprint, downstream_key"
    assert fetch(path, f"SELECT DISTINCT {states} FROM idempotency_keys") == [
        ("completed", 1, 0, None, None, None, None)
    ]


@pytest.mark.parametrize("revision", REVISIONS)
def test_old_database_opens_and_carries_on(tmp_path: Path, revision: str) -> None:
    """A database of each release is backed up, upgraded without losing a value, and worked with."""
    path = old_database(tmp_path, revision)
    before = rows_of(path)
    with Database.open(path, clock=clock) as database:
        with database.unit_of_work() as unit:
            assert [agent.id for agent in unit.agents.list()] == ["büro-日本", "kitchen"]
            config = unit.agents.get("büro-日本").config
            assert json.dumps(config, ensure_ascii=False) == (
                '{"zeta": "ü🏠", "alpha": 12345678901234567890, "tiny": -0.0, "none": null}'
            )
            assert unit.devices.get("admin").metadata_ == {"label": "Großes Tablet"}
            assert unit.devices.get("phone").last_seen_at is None
            assert unit.devices.approve("lock-ñ-🔒")
            assert unit.devices.update_last_seen("phone")
            assert unit.sessions.resolve(agent_id="kitchen", sender_id="alice", channel_id="signal").session_id == "s-2"
            assert unit.sessions.resolve(agent_id="kitchen").session_id == "s-5"
            assert unit.sessions.touch("s-1", NOW)
            assert not unit.nonces.consume("phone", "nonce-1", expires_at=NOW + timedelta(minutes=1))
            assert unit.nonces.consume("lock-ñ-🔒", "nonce-1", expires_at=NOW + timedelta(minutes=1))
            scope = IdempotencyScope("phone", "door.open", "key-1")
            found = unit.idempotency_keys.find(scope)
            assert found is not None
            assert (found.state, found.result) == (IdempotencyState.COMPLETED, {"opened": True, "who": "Zoë 🐈"})
            with pytest.raises(IdempotencyKeyExistsError):
                unit.idempotency_keys.insert(scope, 1, ttl=timedelta(hours=1))
            if revision >= "0003":
                assert unit.devices.get("stolen").revoked_reason == "lost in Köln"
            if revision >= "0004":
                running = unit.idempotency_keys.find(IdempotencyScope("phone", "door.open", "key-running"))
                assert running is not None
                assert running.state is IdempotencyState.IN_PROGRESS
            unit.rollback()
        assert database.verify_secret("phone", SecretStr(RECIPE["SECRET"])) is not None
        with database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="new", name="New", workspace_path="/srv/new"))
            assert unit.agents.delete("new")
    after = rows_of(path)
    assert after[VERSION_TABLE] == [{"version_num": REVISION}]
    assert after["store"] == [{"id": 1, "epoch": 1, "oldest_revision": "0004"}]
    for table in DATA_TABLES:
        assert len(after[table]) == len(before[table])
        for old in before[table]:
            # Every value of an old row is in one new row.
            assert any(old.items() <= new.items() for new in after[table]), old
    assert is_sound(path)
    backups = list(tmp_path.glob("*.backup"))
    if revision == REVISION:
        assert backups == []
        return
    (backup,) = backups
    assert backup.name == f"homeagent.db.{revision}-20231114T221320000000Z.backup"
    assert backup.stat().st_mode & 0o777 == 0o600
    assert fetch(backup, "PRAGMA journal_mode") == [("delete",)]
    assert is_sound(backup)
    assert rows_of(backup) == before
    # The backup is a database that opens.
    with Database.open(backup, clock=clock) as restored, restored.unit_of_work(read_only=True) as unit:
        assert unit.sessions.get("s-1").sender_id == "alice"


def test_old_rows_on_postgresql(empty_postgres_url: str) -> None:
    """On PostgreSQL, too, version 1's rows are kept: routes go to the most recent, results count as completed."""
    with server(empty_postgres_url).begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
        for table, rows in RECIPE["ROWS"]["0001"].items():
            for row in rows:
                names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
                connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), row)
    with Database.open(empty_postgres_url, clock=clock) as database, database.unit_of_work() as unit:
        assert unit.sessions.resolve(agent_id="kitchen", sender_id="alice", channel_id="signal").session_id == "s-2"
        assert unit.sessions.resolve(agent_id="kitchen").session_id == "s-5"
        assert not unit.nonces.consume("phone", "nonce-1", expires_at=NOW + timedelta(minutes=1))
        found = unit.idempotency_keys.find(IdempotencyScope("phone", "door.open", "key-1"))
        assert found is not None
        assert (found.state, found.result) == (IdempotencyState.COMPLETED, {"opened": True, "who": "Zoë 🐈"})
    with server(empty_postgres_url).connect() as connection:
        for table, rows in RECIPE["ROWS"]["0001"].items():
            kept = [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
            assert len(kept) == len(rows)
            for row in rows:
                assert any(row.items() <= new.items() for new in kept), row


@pytest.mark.slow
def test_large_database_upgrades_in_one_transaction(tmp_path: Path) -> None:
    """A version 1 file of 100,000 rows in each table is upgraded whole, in seconds and in one transaction."""
    path, count = tmp_path / "homeagent.db", 100_000
    upgrade(path, "0001")
    with closing(sqlite(path)) as raw:
        raw.execute("BEGIN")
        for table, columns, values in (
            ("agents", "id, name, workspace_path, created_at", "'a' || n, 'A', '/a', n"),
            ("devices", "id, role, shared_secret_hash, paired_at", "'d' || n, 'node', 'h', n"),
            (
                "sessions",
                "session_id, agent_id, sender_id, created_at, last_active_at",
                "'s' || n, 'a' || (1 + n % 1000), 'p' || (n % 70000 / 1000), n, n",
            ),
            ("nonces", "nonce, device_id, created_at, expires_at", "'n' || n, 'd' || (n % 100), n, n"),
            (
                "idempotency_keys",
                "key, method, device_id, result, created_at, expires_at",
                "'k' || n, 'm', 'd' || (n % 100), '1', n, n",
            ),
        ):
            raw.execute(
                f"WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < {count})"
                f" INSERT INTO {table} ({columns}) SELECT {values} FROM counter"
            )
        raw.execute("COMMIT")
    Database.open(path).close()
    assert is_sound(path)
    for table in DATA_TABLES:
        assert fetch(path, f"SELECT count(*) FROM {table}") == [(count,)]
    assert fetch(path, "SELECT count(route_key) FROM sessions") == fetch(
        path, "SELECT count(*) FROM (SELECT DISTINCT agent_id, sender_id, channel_id FROM sessions)"
    )


# Failures


def with_revision(directory: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Have the package find one more revision that does this."""
    following = f"{int(REVISION) + 1:04}"
    scripts = directory / "alembic"
    shutil.copytree(CHECKOUT / "alembic", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (scripts / "versions" / f"{following}_next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f'revision, down_revision, branch_labels, depends_on = "{following}", "{REVISION}", None, None\n\n\n'
        f"def upgrade():\n{lines}\n"
    )
    monkeypatch.setattr(revisions, "script_directory", lambda: scripts)
    for module in (revisions, sqlite_migrations, postgresql_migrations):
        monkeypatch.setattr(module, "REVISION", following)


FAILING = {
    "python": 'op.create_table("half", sa.Column("id", sa.Integer))\nop.execute("DELETE FROM devices")\nraise KeyError',
    "sql": 'op.add_column("devices", sa.Column("half", sa.Integer))\nop.execute("INSERT INTO nowhere VALUES (1)")',
    "constraint": "op.execute(\"UPDATE devices SET role = 'root'\")",
    "reference": 'op.execute("DELETE FROM agents")',
    "commit": 'op.drop_table("nonces")\nop.get_bind().execute(sa.text("UPDATE homeagent_schema_version SET x = 1"))',
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("revision", ["0001", REVISION])
def test_failed_upgrade_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, revision: str) -> None:
    """An upgrade that fails anywhere leaves the schema and the rows as they were, and names the backup."""
    path = old_database(tmp_path, revision)
    before, schema = rows_of(path), fetch(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name")
    with monkeypatch.context() as patch:
        with_revision(tmp_path, patch, FAILING[kind])
        with pytest.raises(MigrationError) as caught:
            Database.open(path, clock=clock)
        assert rows_of(path) == before
        assert fetch(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name") == schema
        assert is_sound(path)
        backup = caught.value.backup
        assert backup is not None
        assert str(backup) in str(caught.value)
        assert rows_of(backup) == before
        with pytest.raises(SchemaOutdatedError):
            Database.open(path, clock=clock, migrate=False)
    with Database.open(path, clock=lambda: NOW + timedelta(seconds=1)) as database:
        assert database.status().schema_revision == REVISION


def test_rebuilding_a_parent_table_keeps_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later revision may rebuild `agents`, which sessions refer to: no session is lost, and references still hold."""
    path = old_database(tmp_path, "0001")
    sessions = fetch(path, "SELECT session_id, agent_id FROM sessions ORDER BY 1")
    with_revision(
        tmp_path,
        monkeypatch,
        'with op.batch_alter_table("agents", recreate="always") as batch:\n'
        '    batch.add_column(sa.Column("colour", sa.Text()))',
    )
    Database.open(path, clock=clock).close()
    assert fetch(path, "SELECT session_id, agent_id FROM sessions ORDER BY 1") == sessions
    assert fetch(path, "SELECT count(colour), count(*) FROM agents") == [(0, 2)]
    with closing(sqlite(path)) as raw:
        raw.execute("PRAGMA foreign_keys=ON")
        with pytest.raises(choose_driver().module.IntegrityError, match="FOREIGN KEY"):
            raw.execute("DELETE FROM agents")


def test_failed_creation_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database whose making failed is none yet: the next opening makes it."""
    path = tmp_path / "homeagent.db"
    with monkeypatch.context() as patch:
        with_revision(tmp_path, patch, FAILING["python"])
        with pytest.raises(MigrationError) as caught:
            Database.open(path)
        assert caught.value.backup is None
    with Database.open(path) as database:
        assert database.status().schema_revision == REVISION


def test_failed_upgrade_on_postgresql_is_undone(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On PostgreSQL a failed upgrade leaves the old schema, and the next one finishes."""
    Database.open(empty_postgres_url).close()
    engine = server(empty_postgres_url)
    with engine.begin() as connection:
        before = postgresql_structure(connection)
    with monkeypatch.context() as patch:
        with_revision(tmp_path, patch, FAILING["sql"])
        with pytest.raises(MigrationError):
            Database.open(empty_postgres_url)
    with engine.begin() as connection:
        assert postgresql_structure(connection) == before
    Database.open(empty_postgres_url).close()


# kill -9

KILLED = """
import os, shutil, signal, sys
from datetime import datetime, timezone
from pathlib import Path

from sqlalchemy import Engine, event

import alembic.command, alembic.autogenerate
from homeagent import Database

source, directory, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
left = 0

def count(statement):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

# Each statement is counted as SQLite begins it, BEGIN, COMMIT and pragmas included.
event.listen(Engine, "connect", lambda connection, record: connection.set_trace_callback(count))
now = datetime(2023, 11, 15, tzinfo=timezone.utc)
for number in range(10_000):
    if number % step:
        continue
    path = directory / str(number) / "homeagent.db"
    path.parent.mkdir(mode=0o700)
    if source:
        shutil.copyfile(source, path)
        path.chmod(0o600)
    # A fork of a process that never opened a database: it starts in a millisecond.
    child = os.fork()
    if not child:
        left = number
        try:
            Database.open(path, clock=lambda: now).close()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(number, status, flush=True)
    if status != -signal.SIGKILL:
        break
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are POSIX")
@pytest.mark.parametrize(
    ("revision", "step"),
    [
        (None, 5),
        ("0001", 3),
        pytest.param(None, 1, marks=pytest.mark.slow),
        pytest.param("0001", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_statement(tmp_path: Path, revision: str | None, step: int) -> None:
    """Killed at any statement, an upgrade leaves the old schema and rows or the new ones, and the next one finishes."""
    source = str(FIXTURES / "revisions" / f"{revision}.db") if revision else ""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, str(tmp_path), str(step)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    # All but the last were killed; that one had more statements than there are.
    assert [status for _, status in ends[:-1]] == [-signal.SIGKILL] * (len(ends) - 1), done.stderr
    assert ends[-1][1] == 0, done.stderr
    assert len(ends) * step > 60
    found: list[str | None] = []
    for number, _ in ends:
        path = tmp_path / str(number) / "homeagent.db"
        version = None
        if path.exists() and path.stat().st_size:
            assert is_sound(path)
            tables = {row[0] for row in fetch(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
            assert not any("tmp" in table for table in tables)
            if VERSION_TABLE in tables:
                ((version,),) = fetch(path, f"SELECT version_num FROM {VERSION_TABLE}")
            else:
                assert tables == set()
        found.append(version)
        with Database.open(path, clock=clock) as database:
            assert database.status().schema_revision == REVISION
            with database.unit_of_work(read_only=True) as unit:
                assert len(unit.agents.list()) == (2 if revision else 0)
        assert is_sound(path)
    # First the old one and from some statement on the new one, never anything in between.
    assert set(found) == {revision, REVISION}
    assert found == sorted(found, key=lambda version: version == REVISION)


# Many at once

OPENS_TOGETHER = """
import sys
from homeagent import AgentCreate, Database

print("ready", flush=True)
for line in sys.stdin:
    name, _, path = line.rstrip().partition(" ")
    try:
        with Database.open(path) as database, database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/" + name))
        print("opened", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""

PROCESSES, ROUNDS = 8, 25


@pytest.fixture(scope="module")
def openers() -> Iterator[list[subprocess.Popen[str]]]:
    """Return processes that wait for a path to open."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", OPENS_TOGETHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert answer(process) == "ready"
        yield processes
    finally:
        for process in processes:
            process.communicate(timeout=30)


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def open_together(processes: list[subprocess.Popen[str]], target: str) -> list[str]:
    """Have all processes open one target at the same moment, and return what they say."""
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"p{number} {target}\n")
        process.stdin.flush()
    return [answer(process) for process in processes]


@pytest.mark.parametrize("revision", [None, "0001"])
def test_processes_open_together(tmp_path: Path, openers: list[subprocess.Popen[str]], revision: str | None) -> None:
    """Eight processes that open one new or old file at once make one schema, lose nothing, and none fails."""
    for number in range(ROUNDS):
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        path = old_database(directory, revision) if revision else directory / "homeagent.db"
        assert open_together(openers, str(path)) == ["opened"] * PROCESSES
        assert fetch(path, f"SELECT version_num FROM {VERSION_TABLE}") == [(REVISION,)]
        assert fetch(path, "SELECT count(*) FROM agents WHERE id LIKE 'p_'") == [(PROCESSES,)]
        assert is_sound(path)
        assert len(list(directory.glob("*.backup"))) == (1 if revision else 0)


@pytest.mark.parametrize("rounds", [1, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_processes_open_postgresql_together(
    openers: list[subprocess.Popen[str]], postgres_url: str, rounds: int
) -> None:
    """Eight processes that open one empty PostgreSQL database at once make one schema, and none fails."""
    for number in range(rounds):
        name = f"together_{rounds}_{number}"
        postgres_execute(postgres_url, f"CREATE DATABASE {name}")
        url = postgres_database(postgres_url, name)
        assert open_together(openers, url) == ["opened"] * PROCESSES
        with server(url).connect() as connection:
            assert connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).all() == [(REVISION,)]
            assert connection.execute(text("SELECT count(*) FROM agents")).scalar_one() == PROCESSES
            assert sorted(inspect(connection).get_table_names()) == sorted([*metadata.tables, VERSION_TABLE])
        postgres_execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_threads_open_together(tmp_path: Path) -> None:
    """Eight threads that open one new file at once make one schema, and none fails."""
    for number in range(ROUNDS):
        path = tmp_path / str(number) / "homeagent.db"
        failures: list[BaseException] = []
        start = threading.Barrier(PROCESSES)

        def opened(
            name: int,
            path: Path = path,
            start: threading.Barrier = start,
            failures: list[BaseException] = failures,
        ) -> None:
            try:
                start.wait(30)
                with Database.open(path) as database, database.unit_of_work() as unit:
                    unit.agents.create(AgentCreate(id=f"p{name}", name="P", workspace_path="/p"))
            except BaseException as error:  # noqa: BLE001  it is shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=opened, args=(name,)) for name in range(PROCESSES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert fetch(path, f"SELECT version_num FROM {VERSION_TABLE}") == [(REVISION,)]
        assert fetch(path, "SELECT count(*) FROM agents") == [(PROCESSES,)]
