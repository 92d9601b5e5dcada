"""A row with a value that its column cannot hold: errors name the row, and methods that do not need the value work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from homeagent import AgentSessionCreate, AgentUpdate, Database, Device, DeviceUpdate, IdempotencyScope, Role
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError, LastAdminError
from tests.command_line import invoke
from tests.conftest import START, add_agent, add_device, pair, write_past_checks

# Values that another program stored, and whether PostgreSQL accepts them.
VALUES = {
    "no JSON": ("metadata", "'hello'", True),
    "a number outside JSON": ("metadata", "'[1, NaN]'", True),
    "a time beyond the year 9999": ("last_seen_at", "1152921504606846976", True),
    "a time as text": ("paired_at", "'yesterday'", False),
    "a BLOB": ("last_seen_at", "x'00ff'", False),
    "a hash as BLOB": ("shared_secret_hash", "CAST(shared_secret_hash AS BLOB)", False),
    "a text as BLOB": ("revoked_reason", "x'00ff'", False),
    "no UTF-8": ("revoked_reason", "CAST(x'ff' AS TEXT)", False),
}


@pytest.fixture(params=VALUES)
def column(request: pytest.FixtureRequest, database: Database, target: str) -> str:
    """Return a column of the device "odd", between two valid devices, with a value that no store writes."""
    column, value, everywhere = VALUES[request.param]
    if "://" in target and not everywhere:
        pytest.skip("PostgreSQL stores no such value in a column of this type")
    for device_id in ("lamp", "odd", "phone"):
        add_device(database, device_id, role=Role.ADMIN)
    write_past_checks(target, f"UPDATE devices SET {column} = {value} WHERE id = 'odd'")
    return str(column)


def test_the_error_names_the_row(database: Database, column: str, caplog: pytest.LogCaptureFixture) -> None:
    """If one row or a list is read, the error has the table, the column and the key, but not the value."""
    acts: list[Callable[[], object]] = [lambda: database.devices.get("odd"), database.devices.list]
    for act in acts:
        with pytest.raises(
            CorruptDatabaseError, match=rf"devices\.{column} holds .*in the row with id 'odd'"
        ) as caught:
            act()
        assert "hello" not in str(caught.value)
        assert "yesterday" not in str(caught.value)
    assert database.devices.get("lamp").id == "lamp"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_unreadable_device_can_be_approved_and_deleted(database: Database, column: str) -> None:
    """The device can be approved, revoked and deleted like any other device, and the last admin is kept."""
    assert database.devices.approve("odd", expected_role=Role.ADMIN) is True
    with pytest.raises(LastAdminError):
        database.devices.delete("odd")
    assert database.devices.approve("phone") is True
    assert database.devices.revoke("odd", reason="lost") is True
    assert database.devices.revoke("phone", force=True) is True
    assert database.devices.delete("odd") is True
    assert len(database.devices.list()) == 2


def test_update_replaces_the_value(database: Database, target: str) -> None:
    """If an update replaces the unreadable value, the update works without a read of the old value."""
    add_device(database)
    add_agent(database)
    write_past_checks(target, "UPDATE devices SET metadata = 'hello'", "UPDATE agents SET config = 'hello'")
    assert database.devices.update("lamp", DeviceUpdate(metadata={"a": 1})).metadata_ == {"a": 1}
    with pytest.raises(CorruptDatabaseError, match=r"agents\.config .* id 'ada'"):
        database.agents.update("ada", AgentUpdate(name="Ada"))
    assert database.agents.update("ada", AgentUpdate(config={"a": 1})).config == {"a": 1}
    write_past_checks(target, "UPDATE agents SET config = 'hello'")
    assert database.agents.delete("ada") is True


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00"])
def test_a_time_that_can_not_be_read_is_not_stored(database: Database, time: str) -> None:
    """If a statement of the session stores a time that is out of range in UTC, the statement raises an error."""
    add_device(database)
    with database.unit_of_work() as unit, pytest.raises(InvalidArgumentError, match="outside the years 1 to 9999"):
        unit.session.execute(update(Device).values(last_seen_at=datetime.fromisoformat(time)))
    assert database.devices.get("lamp").last_seen_at is None


def test_id_that_is_a_blob(sqlite_database: Database, sqlite_path: Path) -> None:
    """If an id was stored as BLOB, a list raises an error that names the row, and so does the command line."""
    add_agent(sqlite_database)
    sqlite_database.sessions.create(AgentSessionCreate(session_id="one", agent_id="ada"))
    write_past_checks(
        sqlite_path,
        "UPDATE sessions SET session_id = x'00ff'",
        "INSERT INTO agents (id, name, workspace_path, created_at) VALUES (x'00ff', 'Odd', '/', 1)",
    )
    for act, column in (
        (sqlite_database.agents.list, "agents.id"),
        (sqlite_database.sessions.list, "sessions.session"),
    ):
        with pytest.raises(
            CorruptDatabaseError, match=rf"{column}.* holds a value that can't be read, in the row with"
        ):
            act()
    for command in ("agents", "sessions"):
        result = invoke("--database", str(sqlite_path), command, "list")
        assert result.exit_code == 1
        assert "holds a value that can't be read" in result.stderr


def test_secret_key_is_not_named(database: Database, target: str) -> None:
    """If a row of an idempotency key is unreadable, the error names its device, not its key."""
    scope = IdempotencyScope("lamp", "on", "geheim")
    database.idempotency_keys.insert(scope, 1, ttl=timedelta(minutes=1))
    write_past_checks(target, "UPDATE idempotency_keys SET result = 'hello'")
    with pytest.raises(CorruptDatabaseError, match=r"idempotency_keys\.result .* device_id 'lamp'") as caught:
        database.idempotency_keys.find(scope)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("column", ["shared_secret_hash", "proof_verifier"])
def test_secret_of_an_unreadable_hash(sqlite_database: Database, sqlite_path: Path, column: str) -> None:
    """If a hash was stored as BLOB, checks of secrets and proofs raise an error that names the column."""
    secret = pair(sqlite_database, "lamp")
    write_past_checks(sqlite_path, f"UPDATE devices SET {column} = CAST({column} AS BLOB)")
    checks: list[Callable[[], object]] = [lambda: sqlite_database.check_secret("lamp", secret)]
    if column == "shared_secret_hash":
        checks += [lambda: sqlite_database.check_secret("lamp", "correct horse battery staple")]
        checks += [lambda: sqlite_database.rotate_secret("lamp")]
    else:
        checks += [lambda: sqlite_database.check_proof("lamp", nonce="n", timestamp=START, proof=bytes(32))]
        checks += [lambda: sqlite_database.proof_parameters("lamp")]
    for check in checks:
        with pytest.raises(CorruptDatabaseError, match=rf"devices\.{column} holds .*in the row with id 'lamp'"):
            check()
