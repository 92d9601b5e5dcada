"""The acceptance list of the store, with a test for each line of the list."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from homeagent import (
    AgentCreate,
    AgentSessionCreate,
    AgentUpdate,
    Database,
    DeviceCreate,
    DeviceStatus,
    DeviceUpdate,
    IdempotencyScope,
    Role,
)
from homeagent.migrations import REVISION, VERSION_TABLE
from tests.conftest import START, FakeClock, add_agent, dump

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    return tmp_path


def test_sqlite_database_created_in_the_home_directory(home: Path) -> None:
    """SQLite database created at ~/.homeagent/homeagent.db."""
    with Database.open() as database:
        assert (home / ".homeagent" / "homeagent.db").is_file()
        assert database.status().location == str(home / ".homeagent" / "homeagent.db")


def test_wal_mode_enabled_for_concurrent_reads(sqlite_database: Database) -> None:
    """WAL mode enabled for concurrent reads: a unit reads while another writes. SQLite only: the files have a WAL."""
    assert sqlite_database.status().pragmas["journal_mode"] == "wal"
    with sqlite_database.unit_of_work() as writer:
        writer.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
        with sqlite_database.unit_of_work(read_only=True) as reader:
            assert reader.agents.list() == []


def test_file_permissions_set_to_0600(home: Path) -> None:
    """File permissions set to 0600, also for the WAL and the shared memory. SQLite only: a server owns its files."""
    with Database.open() as database:
        add_agent(database)
        files = [path for path in (home / ".homeagent").iterdir() if path.is_file()]
        assert {"homeagent.db", "homeagent.db-wal", "homeagent.db-shm"} <= {path.name for path in files}
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_all_v1_tables_created_via_migration_system(database: Database) -> None:
    """All v1 tables created via migration system."""
    status = database.status()
    assert status.schema_revision == REVISION
    assert set(status.rows) == {"devices", "agents", "sessions", "nonces", "idempotency_keys"}


def test_migration_system_tracks_applied_versions_and_runs_pending_ones(tmp_path: Path) -> None:
    """Migration system tracks applied versions and runs pending ones, and leaves an up-to-date file unchanged."""
    from alembic import command
    from homeagent.engine.files import database_file as files
    from homeagent.engine.files.directories import prepare_directory
    from homeagent.engine.sqlite.engine import SQLiteEngine
    from homeagent.migrations import alembic_config

    path = tmp_path / "data" / "homeagent.db"
    prepare_directory(path.parent)
    files.create_file(path)
    engine = SQLiteEngine(path, busy_timeout=MINUTE, durability="full")
    engine.prepare_header()
    with engine.connect() as connection, connection.begin():
        command.upgrade(alembic_config(connection), "0001")
        connection.execute(
            text("INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('ada', 'A', '/a', 0)")
        )
        assert connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one() == "0001"
    engine.close()
    for _ in range(2):
        with Database.open(path) as database:
            assert database.status().schema_revision == REVISION
            assert database.status().rows["agents"] == 1


def test_device_store_supports_crud_and_approve_and_revoke(database: Database) -> None:
    """Device store supports CRUD + approve/revoke."""
    with database.unit_of_work() as unit:
        unit.devices.create(DeviceCreate(id="lamp", role=Role.CLIENT, shared_secret_hash="sha256$x"))
        assert unit.devices.find_by_id("lamp") is not None
        assert unit.devices.update("lamp", DeviceUpdate(metadata={"room": "hall"})).metadata_ == {"room": "hall"}
        assert unit.devices.approve("lamp")
        assert unit.devices.get("lamp").status is DeviceStatus.APPROVED
        assert unit.devices.revoke("lamp")
        assert unit.devices.get("lamp").status is DeviceStatus.REVOKED
        assert unit.devices.update_last_seen("lamp")
        assert unit.devices.delete("lamp")
        assert unit.devices.find_by_id("lamp") is None


def test_agent_store_supports_crud_and_listing(database: Database) -> None:
    """Agent store supports CRUD + listing."""
    for agent_id in ("bob", "ada"):
        add_agent(database, agent_id)
    with database.unit_of_work() as unit:
        assert unit.agents.update("ada", AgentUpdate(name="Countess")).name == "Countess"
        assert [agent.name for agent in unit.agents.list()] == ["Countess", "Bob"]
        assert unit.agents.delete("bob")
        assert unit.agents.find_by_id("bob") is None


def test_session_index_supports_create_and_lookup_by_agent_and_sender(database: Database) -> None:
    """Session index supports create + lookup by agent/sender."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    with database.unit_of_work() as unit:
        for number, (agent, sender) in enumerate([("ada", "x"), ("ada", "y"), ("bob", "x")]):
            unit.sessions.create(AgentSessionCreate(session_id=f"s{number}", agent_id=agent, sender_id=sender))
        assert {row.session_id for row in unit.sessions.list(agent_id="ada")} == {"s0", "s1"}
        assert {row.session_id for row in unit.sessions.list(sender_id="x")} == {"s0", "s2"}


def test_nonce_store_supports_insert_and_lookup_and_expiry(database: Database, clock: FakeClock) -> None:
    """Nonce store supports insert + lookup + expiry."""
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        assert not unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        assert unit.nonces.find("lamp", "n") is not None
        clock.advance(MINUTE)
        assert unit.nonces.find("lamp", "n") is None


def test_idempotency_store_supports_insert_and_lookup_and_expiry(database: Database, clock: FakeClock) -> None:
    """Idempotency store supports insert + lookup + expiry."""
    scope = IdempotencyScope("lamp", "on", "k")
    with database.unit_of_work() as unit:
        unit.idempotency_keys.insert(scope, {"ok": True}, ttl=MINUTE)
        found = unit.idempotency_keys.find(scope)
        assert found is not None
        assert found.result == {"ok": True}
        clock.advance(MINUTE)
        assert unit.idempotency_keys.find(scope) is None


def test_periodic_cleanup_removes_expired_records(database: Database, clock: FakeClock) -> None:
    """Periodic cleanup removes expired records, and leaves unexpired records."""
    with database.unit_of_work() as unit:
        for name, ttl in {"dead": MINUTE, "live": 3 * DAY}.items():
            unit.nonces.consume("lamp", name, expires_at=START + ttl)
            unit.idempotency_keys.insert(IdempotencyScope("lamp", "on", name), 1, ttl=ttl)
    clock.advance(DAY)
    with database.unit_of_work(read_only=True):
        report = database.sweep()
    assert (report.nonces, report.idempotency_keys, report.more) == (1, 1, False)
    rows = dump(database)
    assert [len(rows["nonces"]), len(rows["idempotency_keys"])] == [1, 1]


def test_transactions_roll_back_cleanly_on_failure(database: Database) -> None:
    """Transactions roll back cleanly on failure: no row of any store remains, and work continues."""
    before = dump(database)
    with pytest.raises(RuntimeError), database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
        unit.sessions.resolve(agent_id="ada")
        unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        raise RuntimeError
    assert dump(database) == before
    add_agent(database)
