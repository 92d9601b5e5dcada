"""Upgrades that fail, run at the same time or are killed.

Tests for SQLite only are about files and the copy before an upgrade; postgresql/test_upgrade.py tests the locks and
timeouts of PostgreSQL.
"""

from __future__ import annotations

import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from alembic.config import Config

from alembic import command
from homeagent import Database
from homeagent.engine.sqlite.backup import backup_name
from homeagent.engine.sqlite.manifests import PARTIAL
from homeagent.errors import MigrationError, SchemaOutdatedError
from homeagent.migrations import REVISION, VERSION_TABLE, revisions
from homeagent.migrations import sqlite as sqlite_migrations
from homeagent.models import TABLES
from tests.conftest import Children, RecordProperty, add_agent, postgres_execute
from tests.migrations.old_databases import (
    CHECKOUT,
    FIXTURES,
    NOW,
    change,
    clock,
    fetch,
    is_sound,
    killed_at_statements,
    old_database,
    rows_of,
    sqlite,
)
from tests.migrations.own_revisions import write_revisions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an application's three revisions."""
    return write_revisions(tmp_path / "hub" / "migrations")


# Failures


def with_revision(directory: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Add a revision with this body to the package's revisions."""
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
    for module in (revisions, sqlite_migrations):
        monkeypatch.setattr(module, "REVISION", following)


FAILING = {
    "python": 'op.create_table("half", sa.Column("id", sa.Integer))\nop.execute("DELETE FROM devices")\nraise KeyError',
    "sql": 'op.add_column("devices", sa.Column("half", sa.Integer))\nop.execute("INSERT INTO nowhere VALUES (1)")',
    "constraint": "op.execute(\"UPDATE devices SET role = 'root'\")",
    "reference": 'op.execute("DELETE FROM agents")',
    "commit": 'op.drop_table("nonces")\nop.get_bind().execute(sa.text("UPDATE homeagent_schema_version SET x = 1"))',
}


@pytest.mark.parametrize(("revision", "kind"), [("0001", "sql"), *((REVISION, kind) for kind in FAILING)])
def test_failed_upgrade_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, revision: str) -> None:
    """If an upgrade fails at any point, the schema and the rows are as before, and the error names the backup."""
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
        assert isinstance(caught.value.cause, KeyError) == (kind == "python")
        with pytest.raises(SchemaOutdatedError):
            Database.open(path, clock=clock, migrate=False)
        if kind == "python":  # this body also fails without rows: the next open creates the database
            with pytest.raises(MigrationError) as failed:
                Database.open(tmp_path / "new.db")
            assert failed.value.backup is None
    for each in (path, tmp_path / "new.db"):
        with Database.open(each, clock=lambda: NOW + timedelta(seconds=1)) as database:
            assert database.status().schema_revision == REVISION


UNCONVERTIBLE = {
    "a BLOB": ("UPDATE sessions SET sender_id = x'00ff' WHERE session_id = 's-2'", "sessions.sender_id", "'s-2'"),
    "no UTF-8": ("UPDATE sessions SET agent_id = CAST(x'ff' AS TEXT) WHERE session_id = 's-1'", "agent_id", "'s-1'"),
    "a key": ("UPDATE devices SET id = CAST(x'ff' AS TEXT) WHERE id = 'phone'", "devices.id", r"b'\xff'"),
}


@pytest.mark.parametrize("kind", UNCONVERTIBLE)
def test_unconvertible_row_is_named(tmp_path: Path, kind: str) -> None:
    """If an upgrade cannot convert a row, the error has table, column and key; the file stays and no backup is made."""
    path = old_database(tmp_path, "0001")
    statement, column, key = UNCONVERTIBLE[kind]
    change(path, statement)
    before = path.read_bytes()
    with pytest.raises(MigrationError) as caught:
        Database.open(path, clock=clock)
    assert column in str(caught.value)
    assert f"{key}: the value is" in str(caught.value)
    assert caught.value.backup is None
    assert not list(tmp_path.glob("*.backup*"))
    assert path.read_bytes()[100:] == before[100:]  # the header counts a change of the journal mode


def test_upgrade_without_a_backup_is_refused(tmp_path: Path) -> None:
    """If the copy before an upgrade cannot be made, the upgrade raises an error with the remedy."""
    path = old_database(tmp_path, "0001")
    before = rows_of(path)
    obstacle = path.with_name(backup_name(path, "0001", NOW) + PARTIAL)
    (obstacle / "in it").mkdir(parents=True)
    with pytest.raises(MigrationError, match=r"its backup can't be made: .*partial' is in the way of a backup: remove"):
        Database.open(path, clock=clock)
    assert rows_of(path) == before
    shutil.rmtree(obstacle)
    Database.open(path, clock=clock).close()


def test_rebuilding_a_parent_table_keeps_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a later revision rebuilds `agents`, no session is lost, and the references are still valid."""
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
        with pytest.raises(apsw.ConstraintError, match="FOREIGN KEY"):
            raw.execute("DELETE FROM agents")


# Within a command of the application's own Alembic

HOST_ENVIRONMENT = """
from alembic import context
from homeagent import Database
option = context.config.get_main_option
with Database.open(option("store")) as database, database.unit_of_work() as unit:
    context.configure(connection=unit.session.connection(), version_table="host_version")
    with context.begin_transaction():
        context.run_migrations()
"""

HOST_REVISION = """
import sqlalchemy as sa
from alembic import context, op
from homeagent import Database
revision, down_revision = "h1", None
def upgrade():
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))
    Database.open(context.config.get_main_option("other")).close()
    op.add_column("notes", sa.Column("text", sa.Text))
"""


@pytest.mark.parametrize("revision", [None, "0001"])
def test_upgrade_within_a_command_of_alembic(tmp_path: Path, revision: str | None) -> None:
    """An application's env.py or revision can create or upgrade the database, and Alembic's globals are kept."""
    host, store = tmp_path / "host", tmp_path / "private" / "homeagent.db"
    (host / "versions").mkdir(parents=True)
    (host / "env.py").write_text(HOST_ENVIRONMENT)
    (host / "versions" / "h1.py").write_text(HOST_REVISION)
    if revision is not None:
        store = old_database(tmp_path, revision)
    config = Config()
    for name, value in (("script_location", host), ("store", store), ("other", tmp_path / "other" / "homeagent.db")):
        config.set_main_option(name, str(value))
    command.upgrade(config, "head")
    assert fetch(store, "SELECT version_num FROM host_version") == [("h1",)]
    assert [row[1] for row in fetch(store, "PRAGMA table_info(notes)")] == ["id", "text"]
    for path in (store, tmp_path / "other" / "homeagent.db"):
        assert fetch(path, f"SELECT version_num FROM {VERSION_TABLE}") == [(REVISION,)]


# kill -9


@pytest.mark.parametrize("revision", [None, "0001", REVISION])
@pytest.mark.parametrize("step", [80, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_statement(
    tmp_path: Path, folder: Path, revision: str | None, step: int, record_property: RecordProperty
) -> None:
    """If an upgrade is killed at any statement, both schemas are old or both are new, and the next upgrade succeeds."""
    source = FIXTURES / "revisions" / f"{revision}.db" if revision else None
    action = "Database.open(path, clock=lambda: now, migrations=arguments[0]).close()"
    paths = killed_at_statements(source, tmp_path, step if revision != REVISION else min(step, 20), action, folder)
    assert len(paths) * step > 60
    old = (revision, set[str]())
    new = (REVISION, {"application_schema_version", "notes"})
    found = []
    for path in paths:
        version, own = None, set()
        if path.exists() and path.stat().st_size:
            assert is_sound(path)
            tables = {row[0] for row in fetch(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
            assert not any("tmp" in table for table in tables)
            if VERSION_TABLE in tables:
                ((version,),) = fetch(path, f"SELECT version_num FROM {VERSION_TABLE}")
                own = tables - {*TABLES, VERSION_TABLE, "sqlite_sequence"}
            else:
                assert tables == set()
        found.append((version, own))
        with Database.open(path, clock=clock, migrations=folder) as database:
            status = database.status()
            assert (status.schema_revision, status.application_revision) == (REVISION, "a3")
            assert status.rows["agents"] == (2 if revision else 0)
        assert is_sound(path)
    # First the old state and from some statement on the new state, never a mixture.
    first = found.index(new)
    assert found == [old] * first + [new] * (len(found) - first)
    assert first
    record_property("upgrades killed at each statement", len(paths) - 1)


# Many at the same time

OPENS = """
import sys
from homeagent import AgentCreate, Database
print("ready", flush=True)
sys.stdin.readline()
target, migrations, name = sys.argv[1:]
with Database.open(target, migrations=migrations) as database:
    database.agents.create(AgentCreate(id=name, name=name, workspace_path="/" + name))
"""
TOGETHER = 8
FEW_OR_ALL_ROUNDS = pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])


@FEW_OR_ALL_ROUNDS
@pytest.mark.parametrize(("engine", "revision"), [("sqlite", None), ("sqlite", "0001"), ("postgresql", None)])
def test_processes_open_together(
    tmp_path: Path,
    folder: Path,
    children: Children,
    request: pytest.FixtureRequest,
    engine: str,
    revision: str | None,
    rounds: int,
) -> None:
    """If eight processes open a new or old database together, one makes both schemas, no row is lost, all succeed."""
    for number in range(rounds):
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        target = str(old_database(directory, revision) if revision else directory / "homeagent.db")
        if engine == "postgresql":
            target = request.getfixturevalue("empty_postgres_url")
            postgres_execute(target, "DROP SCHEMA public CASCADE")
            postgres_execute(target, "CREATE SCHEMA public")
        names = [f"p{process}" for process in range(TOGETHER)]
        children.together(OPENS, [(target, folder, name) for name in names])
        with Database.open(target, migrations=folder, migrate=False) as database:
            assert {agent.id for agent in database.agents.list()} >= set(names)
        assert len(list(directory.glob("*.backup"))) == (1 if revision else 0)
        assert engine == "postgresql" or is_sound(Path(target))


@FEW_OR_ALL_ROUNDS
def test_threads_open_together(tmp_path: Path, rounds: int) -> None:
    """If eight threads open a new file at the same time, one schema is made, and all succeed."""
    for number in range(rounds):
        path, start = tmp_path / str(number) / "homeagent.db", threading.Barrier(TOGETHER)

        def opened(name: int, path: Path = path, start: threading.Barrier = start) -> None:
            start.wait(30)
            with Database.open(path) as database:
                add_agent(database, f"p{name}")

        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(opened, range(TOGETHER)))  # raises the first error
        assert fetch(path, f"SELECT version_num FROM {VERSION_TABLE}") == [(REVISION,)]
        assert fetch(path, "SELECT count(*) FROM agents") == [(TOGETHER,)]


@pytest.mark.parametrize("revision", [None, "0001"])
def test_old_text_of_a_rebuilt_table_is_erased(tmp_path: Path, revision: str | None) -> None:
    """After an upgrade, the file has the text of each table only once: deleted pages are overwritten with zeros."""
    path = old_database(tmp_path, revision) if revision else tmp_path / "homeagent.db"
    Database.open(path).close()
    content = path.read_bytes()
    for table in ("devices", "idempotency_keys"):
        assert len(re.findall(rf'CREATE TABLE "?{table}"? \('.encode(), content)) == 1
