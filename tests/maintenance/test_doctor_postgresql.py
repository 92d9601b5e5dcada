"""The doctor on a PostgreSQL server: for each check a database, a role or a session in which exactly that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import make_url

from homeagent import AgentSessionCreate, Database, IdempotencyScope, Role, diagnose
from homeagent.clock import system_clock
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import CHECKS, Severity
from homeagent.maintenance.doctor.report import Collector
from homeagent.maintenance.doctor.store import check_store
from homeagent.migrations import REVISION
from tests.conftest import add_agent, add_device, postgres_database, postgres_execute

# The server of the tests doesn't wait for the disk, so that this is always found; it has a test of its own.
DURABILITY = "durability"


@pytest.fixture(scope="module")
def url(postgres_url: str, postgres_template: str) -> Iterator[str]:
    """A migrated database on the server, which each test leaves as it was, to save the time of making one."""
    name = f"{postgres_template}_doctor"
    postgres_execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {postgres_template} STRATEGY FILE_COPY")
    yield postgres_database(postgres_url, name)
    postgres_execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine_name() -> str:
    """Only a server has what is tested here: connections, standbys, roles."""
    return "postgresql"


def bad(found: Diagnosis) -> dict[str, Severity]:
    """Return what is not ok, but for the tests' server itself; the look must hold against its model."""
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found
    assert set(found.not_checked) | {finding.check for finding in found.findings} <= set(CHECKS)
    return {
        finding.check: finding.severity
        for finding in found.findings
        if finding.severity is not Severity.OK and finding.check != DURABILITY
    }


def at(found: Diagnosis, check: str) -> Any:
    """Return what a check found, which must have been made."""
    finding = found.finding(check)
    assert finding is not None, found.not_checked
    return finding


def execute(url: str, *statements: str) -> None:
    """Change the database behind the package's back."""
    for statement in statements:
        postgres_execute(url, statement)


def test_a_sound_database_is_found_sound(target: str) -> None:
    """With rows in it every check of a server's is made, from outside and while it is open, and each is content."""
    with Database.open(target) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_agent(database)
        with database.unit_of_work() as unit:
            unit.sessions.create(AgentSessionCreate(agent_id="ada"))
        found = diagnose(target)
        assert bad(found) == {}, found
        assert found.not_checked == {}
        first = CHECKS.index("directory")
        assert [finding.check for finding in found.findings] == [
            *CHECKS[:first],
            *CHECKS[CHECKS.index("durability") :],
        ]
        assert found.engine == "postgresql"
        inside = database.doctor(thorough=True)
        assert (bad(inside), inside.not_checked, inside.thorough) == ({}, {}, True)


def test_no_password_is_shown(url: str) -> None:
    """The URL is shown without its passwords, whether the server answers or not."""
    secret = make_url(url).set(password="geheim").update_query_dict({"sslpassword": "geheim"})
    assert "geheim" not in diagnose(secret).model_dump_json()
    nobody = secret.set(host="127.0.0.1", port=1, query={})
    found = diagnose(nobody)
    assert (found.exit_status, at(found, "database").severity) == (2, Severity.CRITICAL)
    assert "schema" in found.not_checked
    assert "geheim" not in found.model_dump_json()


def test_an_empty_database(empty_postgres_url: str) -> None:
    """A database without our tables has no schema; after the command it has one, and nothing was made before."""
    found = diagnose(empty_postgres_url)
    assert bad(found) == {"schema_revision": Severity.CRITICAL}
    assert at(found, "schema_revision").command == "homeagent init"
    assert at(diagnose(empty_postgres_url), "schema_revision").facts["revision"] is None
    Database.open(empty_postgres_url).close()
    assert bad(diagnose(empty_postgres_url)) == {}


@pytest.mark.parametrize(("revision", "severity"), [("0001", Severity.WARNING), ("9999", Severity.CRITICAL)])
def test_another_revision(url: str, revision: str, severity: Severity) -> None:
    """An older schema is to be upgraded, a newer one refused, and --fix touches neither."""
    statements = ("UPDATE homeagent_schema_version SET version_num = '{}'", "UPDATE store SET oldest_revision = '{}'")
    execute(url, *(statement.format(revision) for statement in statements))
    found = diagnose(url, fix=True)
    execute(url, *(statement.format(REVISION) for statement in statements))
    assert bad(found) == {"schema_revision": severity}
    assert found.repairs == []
    assert at(found, "schema_revision").facts == {"revision": revision, "needed": REVISION}


# What was done by hand, how bad that is, and what of it is named.
DRIFTS: list[tuple[str, Severity, str]] = [
    ("DROP INDEX idx_sessions_sender", Severity.WARNING, "idx_sessions_sender"),
    ("DROP INDEX idx_sessions_route", Severity.CRITICAL, "idx_sessions_route"),
    (
        "DROP INDEX idx_idempotency_lease; CREATE INDEX idx_idempotency_lease ON idempotency_keys (lease_expires_at)",
        Severity.WARNING,
        "idx_idempotency_lease",
    ),
    ("CREATE UNIQUE INDEX mine ON devices (role, id)", Severity.CRITICAL, "mine"),
    ("ALTER TABLE devices ADD COLUMN note text", Severity.WARNING, "devices.note"),
    ("ALTER TABLE sessions DROP COLUMN route_key", Severity.CRITICAL, "sessions.route_key"),
    ("ALTER TABLE devices ALTER COLUMN paired_at TYPE integer", Severity.CRITICAL, "devices.paired_at"),
    ("ALTER TABLE devices ALTER COLUMN shared_secret_hash DROP NOT NULL", Severity.CRITICAL, "shared_secret_hash"),
    ("ALTER TABLE devices ALTER COLUMN approved SET DEFAULT 1", Severity.CRITICAL, "devices.approved"),
    ("ALTER TABLE devices DROP CONSTRAINT ck_devices_role", Severity.CRITICAL, "ck_devices_role"),
    (
        "ALTER TABLE devices DROP CONSTRAINT ck_devices_role;"
        " ALTER TABLE devices ADD CONSTRAINT ck_devices_role CHECK (role IN ('client', 'node', 'admin', 'king'))",
        Severity.CRITICAL,
        "ck_devices_role",
    ),
    ("ALTER TABLE sessions DROP CONSTRAINT fk_sessions_agent_id_agents", Severity.CRITICAL, "fk_sessions"),
    ("ALTER TABLE nonces DROP CONSTRAINT pk_nonces", Severity.CRITICAL, "pk_nonces"),
    ("DROP TABLE sessions", Severity.CRITICAL, "table sessions"),
    (
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        " CREATE TRIGGER t BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION f()",
        Severity.CRITICAL,
        "trigger t",
    ),
]


def test_a_schema_changed_by_hand(url: str) -> None:
    """Each change of a table, a column, a constraint, an index or a trigger is named, and as bad as it is."""
    engine = PostgreSQLEngine(make_url(url).set(drivername="postgresql+psycopg"), busy_timeout=timedelta(seconds=5))
    with closing(engine), engine.connect() as connection:
        for statement, severity, named in DRIFTS:
            transaction = connection.begin()
            connection.exec_driver_sql(statement)
            collector = Collector(datetime.now(UTC), thorough=False, watch=Stopwatch(None))
            check_store(collector, connection)
            transaction.rollback()
            finding = collector.findings["schema"]
            assert (statement, finding.severity) == (statement, severity)
            assert named in finding.summary


def test_a_missing_index_is_made_by_its_remedy(url: str) -> None:
    """The remedy of a missing index is the statement that makes it."""
    execute(url, "DROP INDEX idx_idempotency_lease")
    remedy = at(diagnose(url), "schema").remedy
    execute(url, remedy[remedy.index("CREATE ") :])
    assert bad(diagnose(url)) == {}


def test_a_column_that_sorts_as_people_do(url: str) -> None:
    """A column that lost its collation is a change of the schema, which is named."""
    execute(url, 'ALTER TABLE agents ALTER COLUMN id TYPE text COLLATE "POSIX"')
    found = diagnose(url)
    assert bad(found) == {"schema": Severity.CRITICAL}
    assert "agents.id" in at(found, "schema").summary
    execute(url, 'ALTER TABLE agents ALTER COLUMN id TYPE text COLLATE "C"')
    assert bad(diagnose(url)) == {}


def test_a_server_that_does_not_wait_for_the_disk(url: str) -> None:
    """The server of the tests has fsync off; a commit that is answered too soon is told as well."""
    finding = at(diagnose(url), DURABILITY)
    assert (finding.severity, finding.facts["fsync"]) == (Severity.CRITICAL, "off")


def test_a_role_that_may_not_write(url: str) -> None:
    """A role that may only read some table is told which, and the command grants it the rest."""
    name = f"reader_{make_url(url).database}"
    execute(
        url,
        f"CREATE ROLE {name} LOGIN PASSWORD 'x'",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}",
        f"GRANT INSERT, UPDATE, DELETE ON agents, sessions, nonces, store, idempotency_keys TO {name}",
    )
    try:
        reader = make_url(url).set(username=name, password="x")
        found = diagnose(reader)
        assert bad(found) == {"write_access": Severity.CRITICAL}
        assert "devices" in at(found, "write_access").summary
        execute(url, at(found, "write_access").command.replace("CURRENT_USER", name))
        assert bad(diagnose(reader)) == {}
    finally:
        execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@pytest.fixture
def session(url: str) -> Iterator[Any]:
    """A session of somebody else's."""
    import psycopg

    with closing(psycopg.connect(url)) as connection:
        yield connection


@pytest.mark.parametrize("setting", ["datestyle = 'German'", "quote_all_identifiers = on"])
def test_how_a_role_has_things_shown_is_no_fault(target: str, setting: str) -> None:
    """The server writes instants and definitions as a role likes them: the doctor asks for what it can read."""
    execute(target, f"ALTER DATABASE {make_url(target).database} SET {setting}")
    assert bad(diagnose(target)) == {}


def test_the_rows_are_looked_at_and_mended(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rows tell is told on a server too, and --fix sweeps and forgets old hashes there."""
    monkeypatch.setattr("homeagent.maintenance.doctor.store.BACKLOG", 1)
    past = system_clock() - timedelta(days=30)
    with Database.open(target, clock=lambda: past) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_device(database, "lamp")
        database.rotate_secret("desk", overlap=timedelta(hours=1))
        with database.unit_of_work() as unit:
            unit.nonces.consume("desk", "n1", expires_at=past + timedelta(minutes=1))
            unit.nonces.consume("desk", "n2", expires_at=past + timedelta(minutes=1))
            unit.idempotency_keys.insert(IdempotencyScope("ghost", "m", "k"), 1, ttl=timedelta(days=60))
            unit.idempotency_keys.claim(
                IdempotencyScope("desk", "m", "k"), fingerprint="f", lease=timedelta(1), ttl=timedelta(2)
            )
    left = dict.fromkeys(("references", "abandoned_effects", "pending_devices"), Severity.WARNING)
    found = diagnose(target)
    assert bad(found) == {**left, "expired_backlog": Severity.WARNING, "previous_secrets": Severity.WARNING}
    fixed = diagnose(target, fix=True)
    assert bad(fixed) == left
    assert [repair.check for repair in fixed.repairs] == ["expired_backlog", "previous_secrets"]
    ahead = diagnose(target, clock=lambda: past - timedelta(hours=3))
    assert bad(ahead)["clock"] is Severity.CRITICAL


def test_a_row_that_no_store_writes(target: str) -> None:
    """A value that the server accepts and homeagent can't read is named by table, column and key."""
    with Database.open(target) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
    execute(target, "UPDATE devices SET metadata = 'hello'")
    found = diagnose(target)
    assert bad(found) == {"rows": Severity.CRITICAL}
    assert "devices.metadata holds a value that can't be read, in the row with id 'desk'" in at(found, "rows").summary


def test_a_look_that_takes_too_long_is_cut_off(url: str, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that has to wait is ended in time and told, and those after it are made all the same."""
    monkeypatch.setattr("homeagent.maintenance.doctor.diagnosis.QUICK", timedelta(milliseconds=300))
    session.execute("LOCK TABLE agents IN ACCESS EXCLUSIVE MODE")
    found = diagnose(url)
    assert "--thorough" in found.not_checked["clock"]
    assert "--thorough" in found.not_checked["rows"]
    assert at(found, "admins").severity is Severity.OK
    session.rollback()
    assert bad(diagnose(url)) == {}
