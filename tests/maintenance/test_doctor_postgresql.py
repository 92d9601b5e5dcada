"""The doctor on PostgreSQL: for each check, a database, a role or a session with exactly one problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import make_url

from homeagent import AgentSessionCreate, Database, Role, diagnose
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.maintenance.doctor import CHECKS, Severity
from homeagent.maintenance.doctor.report import Collector
from homeagent.maintenance.doctor.store import check_store
from homeagent.migrations import REVISION
from tests.conftest import add_agent, add_device, postgres_copy, postgres_execute
from tests.maintenance.test_doctor import at, bad, healthy, only


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A migrated database on the server; each test restores its state, because a new database takes time."""
    with postgres_copy(request) as url:
        yield url


@pytest.fixture
def engine_name() -> str:
    """PostgreSQL only: the tests cover connections, standbys and roles."""
    return "postgresql"


def execute(url: str, *statements: str) -> None:
    """Change the database without the package."""
    for statement in statements:
        postgres_execute(url, statement)


def test_valid_database_has_no_problem(target: str) -> None:
    """With rows, every check is made on a closed and on an open database, and each is ok."""
    with Database.open(target) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_agent(database)
        with database.unit_of_work() as unit:
            unit.sessions.create(AgentSessionCreate(agent_id="ada"))
        found = diagnose(target)
        assert bad(found) == {}, found
        assert found.not_checked == {}
        first = CHECKS.index("directory")
        assert [finding.check for finding in found.findings] == [*CHECKS[:first], "write_access"]
        assert found.engine == "postgresql"
        inside = database.doctor(thorough=True)
        assert (bad(inside), inside.not_checked, inside.thorough) == ({}, {}, True)


def test_passwords_are_not_shown(url: str) -> None:
    """The URL is shown without its passwords, whether the server answers or not."""
    secret = make_url(url).set(password="geheim").update_query_dict({"sslpassword": "geheim"})
    assert "geheim" not in diagnose(secret).model_dump_json()
    nobody = secret.set(host="127.0.0.1", port=1, query={})
    found = diagnose(nobody)
    assert (found.exit_status, at(found, "database").severity) == (2, Severity.CRITICAL)
    assert "schema" in found.not_checked
    assert "geheim" not in found.model_dump_json()


def test_empty_database(empty_postgres_url: str) -> None:
    """A database without homeagent's tables has no schema; the finding's command creates it."""
    finding = only(diagnose(empty_postgres_url), "schema_revision", Severity.CRITICAL)
    shown = make_url(empty_postgres_url).set(drivername="postgresql+psycopg")
    assert (finding.command, finding.facts["revision"]) == (f"homeagent init --database '{shown}'", None)
    for hidden in (shown.set(password="geheim"), shown.update_query_dict({"options": "-c search_path=public"})):
        finding = only(diagnose(hidden), "schema_revision", Severity.CRITICAL)
        assert finding.command == "homeagent init --database 'postgresql://…'"
    Database.open(empty_postgres_url).close()
    assert bad(diagnose(empty_postgres_url)) == {}


@pytest.mark.parametrize(("revision", "severity"), [("0001", Severity.WARNING), ("9999", Severity.CRITICAL)])
def test_another_revision(url: str, revision: str, severity: Severity) -> None:
    """An older schema has an upgrade as its remedy, a newer schema is critical, and --fix changes neither."""
    statements = ("UPDATE homeagent_schema_version SET version_num = '{}'", "UPDATE store SET oldest_revision = '{}'")
    execute(url, *(statement.format(revision) for statement in statements))
    found = diagnose(url, fix=True)
    execute(url, *(statement.format(REVISION) for statement in statements))
    assert found.repairs == []
    assert only(found, "schema_revision", severity).facts == {"revision": revision, "needed": REVISION}


# The manual change, its severity, and the names in the finding.
WARNING, CRITICAL = Severity.WARNING, Severity.CRITICAL
FUNCTION = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
DRIFTS: list[tuple[str, Severity, str]] = [
    ("DROP INDEX idx_sessions_sender", WARNING, "idx_sessions_sender"),
    ("DROP INDEX idx_sessions_route", CRITICAL, "idx_sessions_route"),
    ("DROP INDEX idx_idempotency_lease;"
     " CREATE INDEX idx_idempotency_lease ON idempotency_keys (lease_expires_at)", WARNING, "idx_idempotency_lease"),
    ("CREATE UNIQUE INDEX mine ON devices (role, id)", CRITICAL, "mine"),
    ("ALTER TABLE devices ADD COLUMN note text", WARNING, "devices.note"),
    ("ALTER TABLE sessions DROP COLUMN route_key", CRITICAL, "sessions.route_key"),
    ("ALTER TABLE devices ALTER COLUMN paired_at TYPE integer", CRITICAL, "devices.paired_at"),
    ('ALTER TABLE agents ALTER COLUMN id TYPE text COLLATE "POSIX"', CRITICAL, "agents.id"),
    ("ALTER TABLE devices ALTER COLUMN shared_secret_hash DROP NOT NULL", CRITICAL, "shared_secret_hash"),
    ("ALTER TABLE devices ALTER COLUMN approved SET DEFAULT 1", CRITICAL, "devices.approved"),
    ("ALTER TABLE devices DROP CONSTRAINT ck_devices_role", CRITICAL, "ck_devices_role"),
    ("ALTER TABLE devices DROP CONSTRAINT ck_devices_role; ALTER TABLE devices ADD CONSTRAINT ck_devices_role"
     " CHECK (role IN ('client', 'node', 'admin', 'king'))", CRITICAL, "ck_devices_role"),
    ("ALTER TABLE sessions DROP CONSTRAINT fk_sessions_agent_id_agents", CRITICAL, "fk_sessions"),
    ("ALTER TABLE nonces DROP CONSTRAINT pk_nonces", CRITICAL, "pk_nonces"),
    ("DROP TABLE sessions", CRITICAL, "table sessions"),
    (f"{FUNCTION}; CREATE TRIGGER t BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION f()", CRITICAL, "trigger t"),
]  # fmt: skip


def test_a_schema_changed_by_hand(url: str) -> None:
    """Each change of a table, a column, a constraint, an index or a trigger is named, with a severity that fits."""
    engine = PostgreSQLEngine(make_url(url).set(drivername="postgresql+psycopg"), busy_timeout=timedelta(seconds=5))
    with closing(engine), engine.connect() as connection:
        for statement, severity, named in DRIFTS:
            transaction = connection.begin()
            connection.exec_driver_sql(statement)
            collector = Collector(datetime.now(UTC), frozenset(), thorough=False, watch=Stopwatch(None))
            check_store(collector, connection)
            transaction.rollback()
            finding = collector.findings["schema"]
            assert (statement, finding.severity) == (statement, severity)
            assert named in finding.summary


def test_a_missing_index_is_made_by_its_remedy(url: str) -> None:
    """The remedy of a missing index is the statement that creates it."""
    execute(url, "DROP INDEX idx_idempotency_lease")
    remedy = at(diagnose(url), "schema").remedy
    execute(url, remedy[remedy.index("CREATE ") :])
    assert bad(diagnose(url)) == {}


def test_role_without_privileges(url: str) -> None:
    """If a role lacks write privileges, a finding names the tables, and its command grants the privileges."""
    name = f"reader_{make_url(url).database}"
    execute(
        url,
        f"CREATE ROLE {name} LOGIN PASSWORD 'x'",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}",
        f"GRANT INSERT, UPDATE, DELETE ON agents, sessions, nonces, store, idempotency_keys TO {name}",
    )
    try:
        reader = make_url(url).set(username=name, password="x")
        finding = only(diagnose(reader), "write_access", Severity.CRITICAL)
        assert "devices" in finding.summary
        execute(url, finding.command.replace("CURRENT_USER", name))
        assert bad(diagnose(reader)) == {}
    finally:
        execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@pytest.mark.parametrize("setting", ["datestyle = 'German'", "quote_all_identifiers = on"])
def test_display_settings_of_a_role_are_ignored(target: str, setting: str) -> None:
    """If a role has display settings for times or definitions, the doctor overrides them and finds no problem."""
    execute(target, f"ALTER DATABASE {make_url(target).database} SET {setting}")
    assert bad(diagnose(target)) == {}


def test_rows_are_checked_and_repaired(target: str) -> None:
    """If no process has the database open, --fix repairs its rows, and unreadable rows are a finding."""
    with Database.open(target) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_agent(database)
        database.sessions.resolve(agent_id="ada", sender_id="anna")
    execute(target, "UPDATE sessions SET sender_id = 'bert'")
    assert bad(diagnose(target)) == {"routes": Severity.WARNING}
    assert healthy(diagnose(target, fix=True), "routes")
    execute(target, "UPDATE devices SET metadata = 'hello' WHERE id = 'desk'")
    finding = only(diagnose(target), "rows", Severity.CRITICAL)
    assert "devices.metadata holds a value that can't be read, in the row with id 'desk'" in finding.summary


def test_slow_check_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a check has to wait, the check is ended and reported, and the later checks are still made."""
    monkeypatch.setattr("homeagent.maintenance.doctor.diagnosis.QUICK", timedelta(milliseconds=300))
    with closing(psycopg.connect(url)) as session:
        session.execute("LOCK TABLE agents IN ACCESS EXCLUSIVE MODE")
        found = diagnose(url)
    assert "--thorough" in found.not_checked["clock"]
    assert "--thorough" in found.not_checked["rows"]
    assert at(found, "admins").severity is Severity.OK
    assert bad(diagnose(url)) == {}
