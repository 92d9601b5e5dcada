"""The schema's history: the result of each revision, and old rows after an upgrade.

Tests for SQLite only are about files: kept databases of each release, and rebuilt tables. The revisions themselves run
on both engines.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from homeagent import AgentCreate, Database, IdempotencyScope, IdempotencyState
from homeagent.engine.files.database_file import create_file
from homeagent.engine.sqlite.engine import APPLICATION_ID, SQLiteEngine
from homeagent.errors import IdempotencyKeyExistsError
from homeagent.migrations import REVISION, VERSION_TABLE, revisions
from homeagent.models import DATA_TABLES, SCHEMA, metadata
from homeagent.models.session import route_key
from tests import fork_server
from tests.conftest import postgres_execute
from tests.migrations.old_databases import (
    CHECKOUT,
    FIXTURES,
    NOW,
    RECIPE,
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
    upgrade,
)
from tests.migrations.structure import postgresql_structure, sqlite_structure

# The models and the revisions give the same schema


def alembic_cli(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run Alembic's command line in the checkout, as a contributor does, and return the exit code and the output."""
    known = {name: value for name, value in os.environ.items() if name != "HOMEAGENT_DATABASE"}
    program = "from alembic.config import main\nmain(prog='alembic')"
    done = fork_server.run(program, *arguments, environment={**known, **environment})
    return done.returncode, done.stdout + done.stderr


def test_alembic_check(empty_postgres_url: str) -> None:
    """`alembic check` compares the models with a scratch database or a server. The command `upgrade` is refused."""
    Database.open(empty_postgres_url).close()
    with plain_engine(empty_postgres_url).begin() as connection:
        connection.execute(text("CREATE TABLE a_host_application (id integer PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)"))
    for environment in ({}, {"HOMEAGENT_DATABASE": empty_postgres_url}):
        code, output = alembic_cli("check", **environment)
        assert (code, "No new upgrade operations detected" in output) == (0, True), output
    code, output = alembic_cli("upgrade", "head")
    assert (code != 0, "use 'homeagent migrate'" in output) == (True, True), output


def test_autogenerate_drafts_plain_types(tmp_path: Path) -> None:
    """A drafted revision has only plain `sa.` types, for each column type of homeagent."""
    copy = tmp_path / "alembic"
    shutil.copytree(CHECKOUT / "alembic", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for revision in REVISIONS[REVISIONS.index("0003") :]:
        next(copy.glob(f"versions/{revision}_*")).unlink()
    configuration = tmp_path / "alembic.ini"
    configuration.write_text(f"[alembic]\nscript_location = {copy}\n")
    code, output = alembic_cli(
        "-c", str(configuration), "revision", "--autogenerate", "--rev-id", "0003", "-m", "draft"
    )
    assert code == 0, output
    draft = (copy / "versions" / "0003_draft.py").read_text()
    assert "sa.Column('approved_at', sa.BigInteger().with_variant(sa.Integer(), \"sqlite\")" in draft
    assert "idx_sessions_route" in draft
    assert "homeagent" not in draft


def test_sqlite_schema_equals_the_models(tmp_path: Path) -> None:
    """The upgraded schema is the one that the models create: types, defaults, CHECKs, indexes, options.

    Only the order of columns may differ: ADD COLUMN appends, and a model lists its fields in any order.
    """
    migrated, created = tmp_path / "migrated.db", tmp_path / "created.db"
    Database.open(migrated).close()
    create_file(created)
    engine = SQLiteEngine(created, busy_timeout=timedelta(0), durability="normal")
    with engine.connect() as connection, connection.begin():
        metadata.create_all(connection, tables=SCHEMA)
    engine.close()
    with closing(sqlite(migrated)) as upgraded, closing(sqlite(created)) as model:
        structure = sqlite_structure(upgraded)
        assert structure == sqlite_structure(model)
    assert "CONSTRAINT ck_devices_role CHECK (role IN ('client', 'node', 'admin'))" in structure["devices"][0]
    assert structure["idx_idempotency_lease"].endswith(" WHERE state = 'in_progress'")
    assert structure["nonces"][1] == "WITHOUT ROWID"


def test_postgresql_schema_equals_the_models(empty_postgres_url: str) -> None:
    """On PostgreSQL the upgraded schema is also the one that the models create, collations included."""
    Database.open(empty_postgres_url).close()
    with plain_engine(empty_postgres_url).begin() as connection:
        migrated = postgresql_structure(connection)
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
        metadata.create_all(connection, tables=SCHEMA)
        assert migrated == postgresql_structure(connection)
    assert any("'C'" in str(row) or row[5] == "C" for row in migrated["columns"])


# Released revisions do not change


@pytest.mark.parametrize("revision", REVISIONS)
def test_released_revision_is_unchanged(tmp_path: Path, revision: str) -> None:
    """A released revision still creates the schema of the database that was kept at its release."""
    upgrade(tmp_path / "now.db", revision)
    kept = old_database(tmp_path, revision)
    assert fetch(kept, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert fetch(kept, "PRAGMA journal_mode") == [("delete",)]
    assert fetch(kept, f"SELECT version_num FROM {VERSION_TABLE}") == [(revision,)]
    with closing(sqlite(tmp_path / "now.db")) as now, closing(sqlite(kept)) as then:
        assert sqlite_structure(now) == sqlite_structure(then)


def test_every_revision_has_a_fixture() -> None:
    """`REVISION` is the newest revision, and each revision has a database file from make_revisions.py."""
    assert REVISIONS[-1] == REVISION
    assert list(REVISIONS) == sorted(path.stem for path in (FIXTURES / "revisions").glob("*.db"))


# Old rows


@pytest.mark.parametrize("revision", REVISIONS)
def test_old_database_is_upgraded_and_works(tmp_path: Path, revision: str) -> None:  # noqa: PLR0915  one sequence of steps
    """A database of each release is backed up, upgraded without the loss of a value, and can be used."""
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
                assert getattr(running, "state", None) is IdempotencyState.IN_PROGRESS
            unit.rollback()
        assert database.verify_secret("phone", SecretStr(RECIPE["SECRET"])) is not None
        with database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="new", name="New", workspace_path="/srv/new"))
            assert unit.agents.delete("new")
    after = rows_of(path)
    assert after[VERSION_TABLE] == [{"version_num": REVISION}]
    (record,) = after["store"]
    assert len(record.pop("proof_key")) == 64
    assert record == {"id": 1, "epoch": 1, "oldest_revision": "0004"}
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
    # The backup is a database that can be opened.
    with Database.open(backup, clock=clock) as restored, restored.unit_of_work(read_only=True) as unit:
        assert unit.sessions.get("s-1").sender_id == "alice"


ODD_APPROVALS = ["'false'", "'true'", "''", "2", "-1", "1.5", "x'01'", "x'31'"]
APPROVALS = ["1", "1.0", "'1'"]


@pytest.mark.parametrize("revision", few("0001", "0005", of=REVISIONS[: REVISIONS.index("0006")]))
def test_unreadable_approvals_are_withdrawn(tmp_path: Path, revision: str, caplog: pytest.LogCaptureFixture) -> None:
    """0006 keeps only 1 as an approval and names each other device; the backup keeps the stored values."""
    path = old_database(tmp_path, revision)
    with closing(sqlite(path)) as raw:
        for value in [*ODD_APPROVALS, *APPROVALS, "0"]:
            raw.execute(
                "INSERT INTO devices (id, role, shared_secret_hash, approved, paired_at)"
                f" VALUES (?, 'admin', 'h', {value}, 1)",
                [f"is {value}"],
            )
    before = rows_of(path)["devices"]
    odd = sorted(f"is {value}" for value in ODD_APPROVALS)
    Database.open(path, clock=clock).close()
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "approvals_withdrawn"]
    assert (record.levelname, record.name, vars(record)["devices"]) == ("WARNING", "homeagent", odd)
    assert all(repr(name) in record.getMessage() for name in odd)
    after = rows_of(path)["devices"]
    assert sorted(after, key=lambda row: row["id"]) == sorted(
        ({**row, "approved": 0} if row["id"] in odd else row for row in before), key=lambda row: row["id"]
    )
    assert {(type(row["approved"]), row["approved"]) for row in after} == {(int, 0), (int, 1)}
    assert {f"is {value}" for value in APPROVALS} < {row["id"] for row in after if row["approved"]}
    (backup,) = tmp_path.glob("*.backup")
    assert rows_of(backup)["devices"] == before
    with closing(sqlite(path)) as raw:
        for value in ODD_APPROVALS:
            with pytest.raises(apsw.ConstraintError, match="ck_devices_approved"):
                raw.execute(f"UPDATE devices SET approved = {value}")
    caplog.clear()
    Database.open(path).close()
    assert not [record for record in caplog.records if getattr(record, "event", "") == "approvals_withdrawn"]


@pytest.fixture
def old_target(engine_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Create an empty database on each engine at a revision, and return the path or the URL."""

    def make(revision: str) -> Any:
        if engine_name == "sqlite":
            upgrade(tmp_path / "homeagent.db", revision)
            return tmp_path / "homeagent.db"
        url = request.getfixturevalue("empty_postgres_url")
        with plain_engine(url).begin() as connection:
            revisions.upgrade(connection, revision)
        return url

    return make


def insert(target: Any, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Insert rows into their tables, as another program would."""
    with plain_engine(target).begin() as connection:
        for table, row in rows:
            values = ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"), row)


@pytest.mark.parametrize("engine_name", ["postgresql"])
@pytest.mark.parametrize("revision", ["0001", "0005"])
def test_unreadable_approvals_are_withdrawn_on_postgresql(
    old_target: Callable[[str], Any], revision: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On PostgreSQL 0006 also turns any other number, and a null from another program, into 0."""
    url = old_target(revision)
    postgres_execute(url, "ALTER TABLE devices ALTER COLUMN approved DROP NOT NULL")
    device = {"role": "admin", "shared_secret_hash": "h", "paired_at": 1}
    insert(url, (("devices", {**device, "id": f"is {value}", "approved": value}) for value in (0, 1, 2, -1, None)))
    with Database.open(url) as database, database.unit_of_work(read_only=True) as unit:
        assert [device.id for device in unit.devices.list(approved=True)] == ["is 1"]
        found = unit.session.connection().execute(text("SELECT DISTINCT approved FROM devices ORDER BY 1"))
        assert found.scalars().all() == [0, 1]
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "approvals_withdrawn"]
    assert vars(record)["devices"] == ["is -1", "is 2", "is None"]


# Sender, stored key, last activity; the key is right if it equals the sender.
ROUTES_OF_0007: dict[str, tuple[str | bytes | None, str | None, int]] = {
    "holder": ("ann", "ann", 1),  # no stored key belongs to another session, so the holder stays the holder
    "later": ("ann", None, 9),
    "free-1": ("bob", None, 1),
    "free-2": ("bob", None, 2),
    "stale-1": ("eve", "ann-before", 1),
    "stale-2": ("eve", "bob-before", 2),
    "outrun": ("kim", "kim", 1),  # another session moved to the route later, and still has its old key
    "moved": ("kim", "eve-before", 2),
    "alone": (None, "odd", 1),
}


def test_routes_are_computed_again(old_target: Callable[[str], Any]) -> None:
    """0008 gives each route to the last active session with a key, or else to the last active session."""
    target = old_target("0007")
    insert(target, [("agents", {"id": "ada", "name": "A", "workspace_path": "/a", "created_at": 1})])
    rows = dict(ROUTES_OF_0007)
    if isinstance(target, Path):
        rows["binary"] = (b"\xff", None, 1)  # SQLite keeps a value that is not text; the row stays and has no route
    for session_id, (sender, key, active) in rows.items():
        stored = key and (route_key("ada", key, None) if key == sender else key)
        session = {"session_id": session_id, "agent_id": "ada", "sender_id": sender, "created_at": 1}
        insert(target, [("sessions", {**session, "last_active_at": active, "route_key": stored})])
    expected = {"ann": "holder", "bob": "free-2", "eve": "stale-2", "kim": "moved", None: "alone"}
    with Database.open(target) as database, database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        holders = connection.execute(text("SELECT session_id, route_key FROM sessions ORDER BY 1")).all()
        assert {session_id for session_id, key in holders if key} == set(expected.values())
        for sender, holder in expected.items():
            assert unit.sessions.resolve(agent_id="ada", sender_id=sender).session_id == holder
        assert len(holders) == len(rows)


def test_results_of_old_devices(old_target: Callable[[str], Any]) -> None:
    """0010 keeps all results. After the upgrade, a deletion by SQL also deletes the results of an old device."""
    target = old_target("0009")
    device = {"id": "kept", "role": "node", "shared_secret_hash": "h", "paired_at": 1}
    key = {"key": "k", "method": "m", "result": "1", "created_at": 0, "expires_at": 4_000_000_000_000}
    # The old version kept the result of a device that SQL deleted.
    results = [("idempotency_keys", {**key, "device_id": device_id}) for device_id in ("gone", "kept")]
    insert(target, [("devices", device), *results])
    with Database.open(target, clock=clock) as database:
        query = text("SELECT device_id FROM idempotency_keys ORDER BY 1")
        with database.unit_of_work() as unit:
            connection = unit.session.connection()
            assert connection.execute(query).scalars().all() == ["gone", "kept"]
            connection.execute(text("DELETE FROM devices"))
            assert connection.execute(query).scalars().all() == ["gone"]


# Rows that an earlier release stored, and that no method would store today: ids, a result and a route that are odd. The
# characters are in the texts themselves, because both engines must store them.
ODD = ["a/../b", "back\\slash", "pho\u202ene", "tab\there", "x" * 600, " ", "\u200b", "o'Hara; --", "NULL"]
LONG = json.dumps({"text": "ü" * 150_000}, ensure_ascii=False)  # 300,000 bytes


def awkward_rows() -> list[tuple[str, dict[str, Any]]]:
    """Return rows of version 1, each with the name of its table. Absent columns are NULL."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, odd in enumerate(ODD):
        session = {"agent_id": odd, "created_at": number, "last_active_at": number}
        lives = {"device_id": odd, "created_at": 0, "expires_at": 4_000_000_000_000}
        rows += [
            ("agents", {"id": odd, "name": odd, "workspace_path": odd, "created_at": 0}),
            ("devices", {"id": odd, "role": "node", "shared_secret_hash": odd, "paired_at": 0, "metadata": "null"}),
            # Three sessions of one route, and two of a route without a sender and a channel.
            *(("sessions", {**session, "session_id": f"{odd}{n}", "sender_id": odd, "channel_id": odd}) for n in "123"),
            *(("sessions", {**session, "session_id": f"{odd}{n}"}) for n in "45"),
            ("nonces", {"nonce": odd, **lives}),
            ("idempotency_keys", {"key": odd, "method": odd, "result": "null" if number else LONG, **lives}),
        ]
    return rows


@pytest.mark.parametrize(
    ("engine_name", "revision"),
    [
        *(pytest.param("sqlite", *each.values, marks=each.marks) for each in few("0001", "0007", of=REVISIONS)),
        ("postgresql", "0001"),
        ("postgresql", "0007"),
    ],
)
def test_awkward_rows_are_kept(old_target: Callable[[str], Any], revision: str) -> None:
    """An upgrade from each revision keeps rows that no method would store today, and the stores find these rows."""
    target = old_target(revision)
    insert(target, awkward_rows())
    # Before revision 0009 there was no feed, and the upgrade adds no change of an old device.
    with Database.open(target, clock=clock) as database:
        changes = {change.device_id for change in database.devices.changes(after=0)}
        assert changes == (set(ODD) if revision >= "0009" else set())
        with database.unit_of_work() as unit:
            for odd in ODD:
                assert (unit.devices.get(odd).approved, unit.devices.get(odd).metadata_) == (False, None)
                live = unit.sessions.resolve(agent_id=odd, sender_id=odd, channel_id=odd)
                assert (live.session_id, unit.sessions.resolve(agent_id=odd).session_id) == (f"{odd}3", f"{odd}5")
                record = unit.idempotency_keys.find(IdempotencyScope.of_record(odd, odd, odd))
                assert record is not None
                result = json.loads(LONG) if odd == ODD[0] else None
                assert (record.state, record.result) == (IdempotencyState.COMPLETED, result)
                assert unit.nonces.find(odd, odd) is not None
                assert unit.agents.get(odd).workspace_path == odd
            connection = unit.session.connection()
            kept = {
                table: [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
                for table in DATA_TABLES
            }
        for table, found in kept.items():
            rows = [row for name, row in awkward_rows() if name == table]
            assert len(found) == len(rows)
            for row in rows:
                assert any(row.items() <= new.items() for new in found), row


@pytest.mark.slow
def test_large_database_upgrades_in_one_transaction(tmp_path: Path) -> None:
    """A version 1 file with 100,000 rows in each table is upgraded in one transaction, within seconds."""
    path, count = tmp_path / "homeagent.db", 100_000
    upgrade(path, "0001")
    rows = f"WITH RECURSIVE rows(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM rows WHERE n < {count}) INSERT INTO "
    change(
        path,
        f"{rows} agents SELECT 'a' || n, 'A', '/a', n, NULL FROM rows",
        f"{rows} devices SELECT 'd' || n, 'node', 'h', 0, n, NULL, NULL FROM rows",
        f"{rows} sessions SELECT 's' || n, 'a' || (1 + n % 1000), 'p' || (n % 70000 / 1000), NULL, n, n FROM rows",
        f"{rows} nonces SELECT 'n' || n, 'd' || (n % 100), n, n FROM rows",
        f"{rows} idempotency_keys SELECT 'k' || n, 'm', 'd' || (n % 100), '1', n, n FROM rows",
    )
    Database.open(path).close()
    assert is_sound(path)
    for table in DATA_TABLES:
        assert fetch(path, f"SELECT count(*) FROM {table}") == [(count,)]
    assert fetch(path, "SELECT count(route_key) FROM sessions") == fetch(
        path, "SELECT count(*) FROM (SELECT DISTINCT agent_id, sender_id, channel_id FROM sessions)"
    )
