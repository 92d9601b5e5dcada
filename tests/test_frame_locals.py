"""An error reporter that records local variables sees no secret, nonce, key or result."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import SecretStr
from sqlalchemy import Float, bindparam, insert, select, text

import homeagent
from homeagent import (
    Agent,
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    AgentSessionUpdate,
    AgentUpdate,
    Database,
    DevicePair,
    DeviceUpdate,
    IdempotencyScope,
    Nonce,
    ReplayGuard,
    Role,
    Statement,
    UnitOfWork,
    errors,
    hash_secret,
    scram,
)
from homeagent.credentials import hashing
from homeagent.fastapi import bearer_token
from tests.conftest import START, add_agent, add_device
from tests.credentials.conftest import cheap_hashes as cheap_hashes
from tests.credentials.conftest import dearer

pytestmark = pytest.mark.usefixtures("cheap_hashes")

PACKAGE = str(Path(homeagent.__file__).parent)
SECRET = "the-secret-0123456789"
MINUTE = timedelta(minutes=1)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


GENERATED = "<string>"
"""File name of the functions that the package generates."""


def shown(error: BaseException) -> list[str]:
    """Return the local variables in frames of the package, and of context managers, that show `SECRET`."""
    return [
        f"{frame.name}:{name}"
        for one in chain(error)
        for frame in traceback.TracebackException.from_exception(one, capture_locals=True).stack
        if frame.filename.startswith(PACKAGE) or frame.filename in (GENERATED, contextlib.__file__)
        for name, value in (frame.locals or {}).items()
        if SECRET in value
    ]


def scope(key: str = SECRET) -> IdempotencyScope:
    return IdempotencyScope("lamp", "open", key)


def refused_by_orm(database: Database) -> None:
    with database.unit_of_work() as unit:
        for _ in range(2):
            unit.session.add(Agent(id="ada", name=SECRET, workspace_path="/srv", created_at=START))
            unit.session.flush()
            unit.session.expunge_all()


def at_the_limit(database: Database) -> None:
    """Consume more nonces in a unit than the limit of the device."""
    with database.unit_of_work() as unit:
        for nonce in ("n", SECRET):
            unit.nonces.consume("lamp", nonce, expires_at=START + MINUTE, limit=1)


def settled(database: Database) -> None:
    """Record a result for a key without an owning attempt."""
    with database.unit_of_work() as unit:
        attempt = unit.idempotency_keys.claim(scope(), fingerprint="f", lease=MINUTE, ttl=MINUTE)
        unit.idempotency_keys.forget(scope())
        assert isinstance(attempt, homeagent.Attempt)
        unit.idempotency_keys.complete(attempt, {"result": SECRET})


ADD: Statement[None] = Statement(insert(Agent))
VALUES = {"id": SECRET, "name": SECRET, "workspace_path": "/srv", "created_at": START, "config": {}}


def filtering(database: Database) -> None:
    """Search by the session for a value that the column's type refuses."""
    column: Any = Agent.config
    with database.unit_of_work() as unit:
        unit.session.execute(select(Agent).where(column == {SECRET: object()}))


def after_a_flush(database: Database) -> None:
    """Run a store's statement after the refused flush of another row."""
    with database.unit_of_work() as unit:
        unit.session.add(Nonce(device_id="lamp", nonce="n", expires_at=START, created_at=START))
        unit.session.flush()
        unit.session.expunge_all()
        unit.session.add(Nonce(device_id="lamp", nonce="n", expires_at=START, created_at=START))
        unit.write(ADD, **VALUES)


def after_the_end(database: Database) -> None:
    with database.unit_of_work() as unit:
        pass
    unit.write(ADD, **VALUES)


def after_a_rollback(database: Database) -> None:
    with database.unit_of_work() as unit:
        unit.rollback()
        unit.one(ADD, **VALUES)


REFUSED: dict[str, Callable[[Database], Any]] = {
    "bad value of a statement": lambda database: database.run(
        lambda unit: unit.write(ADD, **{**VALUES, "created_at": START.replace(tzinfo=None)})
    ),
    "value of a wrong type": lambda database: database.run(
        lambda unit: unit.one(Statement(select(bindparam("value", type_=Float()))), value=SECRET)
    ),
    "filter of the session": filtering,
    "statement without a value": lambda database: database.run(lambda unit: unit.write(ADD, id=SECRET)),
    "duplicate in write_many": lambda database: database.run(lambda unit: unit.write_many(ADD, [VALUES] * 2)),
    "statement after a refused flush": after_a_flush,
    "statement after the end": after_the_end,
    "statement after a rollback": after_a_rollback,
    "nonce at the limit": at_the_limit,
    "nonce twice in a unit": lambda database: database.nonces.consume("", SECRET, expires_at=START + MINUTE),
    "guard": lambda database: ReplayGuard().check(database.nonces, "", SECRET, signed_at=START),
    "result without an owner": settled,
    "row that the ORM inserts": refused_by_orm,
    "scope": lambda database: scope(SECRET + "\0"),
    "scope of a record": lambda database: IdempotencyScope.of_record("lamp", None, SECRET),  # type: ignore[arg-type]
    "secret that is too long": lambda database: hash_secret(SECRET * 100),
    "key of a human": lambda database: scram.derive_proof_keys(SECRET + "\0", scram.ProofParameters(bytes(16), 4096)),
    "token with a lone surrogate": lambda database: bearer_token("lamp", SECRET + "\ud800"),
    # The caller passes a wrong type on purpose.
    "token of bytes": lambda database: bearer_token("lamp", SECRET.encode()),  # type: ignore[arg-type]
    "message of a proof": lambda database: scram.proof_message(device_id="lamp", nonce=SECRET, timestamp=MINUTE),
}


def test_no_context_manager_shows_a_message_of_sqlite(sqlite_database: Database) -> None:
    """If a trigger refuses a row by a message with a value of the row, no frame holds the message."""
    trigger = "CREATE TRIGGER own BEFORE INSERT ON agents BEGIN SELECT RAISE(ABORT, NEW.name); END"
    with sqlite_database.unit_of_work() as unit:
        unit.session.execute(text(trigger))
    with pytest.raises(errors.ConflictError) as caught:
        sqlite_database.run(lambda unit: unit.write_many(ADD, [VALUES]))
    assert shown(caught.value) == []


@pytest.mark.parametrize("kind", REFUSED)
def test_no_frame_shows_a_refused_value(database: Database, kind: str) -> None:
    """If an open database raises, the error keeps its traceback, and no frame of the package holds the value."""
    add_device(database)
    with pytest.raises(errors.HomeAgentError) as caught:
        REFUSED[kind](database)
    assert shown(caught.value) == []
    *_, last = traceback.extract_tb(caught.value.__traceback__)
    assert last.filename.startswith((PACKAGE, GENERATED)) or REFUSED[kind] in (refused_by_orm, filtering, after_a_flush)


IN_A_UNIT: dict[str, Callable[[UnitOfWork], Any]] = {
    "agents.create": lambda unit: unit.agents.create(
        AgentCreate(id="ada", name="Ada", workspace_path="/srv", config=SECRET)
    ),
    "agents.update": lambda unit: unit.agents.update("eve", AgentUpdate(config=SECRET)),
    "devices.update": lambda unit: unit.devices.update("radio", DeviceUpdate(metadata=SECRET)),
    "devices.revoke": lambda unit: unit.devices.revoke("radio", reason=SECRET),
    "sessions.create": lambda unit: unit.sessions.create(
        AgentSessionCreate(session_id="s", agent_id="ada", sender_id=SECRET, metadata=SECRET)
    ),
    "sessions.resolve": lambda unit: unit.sessions.resolve(agent_id="eve", sender_id=SECRET),
    "sessions.start": lambda unit: unit.sessions.start(agent_id="eve", channel_id=SECRET),
    "sessions.move": lambda unit: unit.sessions.move("s", agent_id="eve", sender_id=SECRET),
    "sessions.list": lambda unit: unit.sessions.list(sender_id=SECRET, limit=0),
    "sessions.update": lambda unit: unit.sessions.update("none", AgentSessionUpdate(metadata=SECRET)),
    "sessions.index": lambda unit: unit.sessions.index(
        [AgentSession(session_id="t", agent_id="eve", sender_id=SECRET, created_at=START, last_active_at=START)]
    ),
}


@pytest.mark.parametrize("method", IN_A_UNIT)
def test_no_frame_in_a_unit_shows_an_argument(sqlite_database: Database, method: str) -> None:
    """If a method of a store raises inside a unit, no frame holds the method's data, such as metadata and senders."""
    add_agent(sqlite_database)
    sqlite_database.sessions.create(AgentSessionCreate(session_id="s", agent_id="ada"))
    with sqlite_database.unit_of_work() as unit, pytest.raises(errors.HomeAgentError) as caught:
        IN_A_UNIT[method](unit)
    assert shown(caught.value) == []


CLOSED: dict[str, Callable[[Database], Any]] = {
    "verify_secret": lambda database: database.verify_secret("lamp", SECRET),
    "acheck_secret": lambda database: anyio.run(database.acheck_secret, "lamp", SECRET),
    "pair": lambda database: database.pair(DevicePair(id="x", role=Role.NODE, shared_secret=SecretStr(SECRET))),
    "rotate_secret": lambda database: database.rotate_secret("lamp", SecretStr(SECRET)),
    "verify_proof": lambda database: database.verify_proof("lamp", nonce=SECRET, timestamp=START, proof=bytes(32)),
    "consume": lambda database: database.nonces.consume("lamp", SECRET, expires_at=START + MINUTE),
    "find a nonce": lambda database: database.nonces.find("lamp", SECRET),
    "find a key": lambda database: database.idempotency_keys.find(scope()),
    "insert": lambda database: database.idempotency_keys.insert(scope(), SECRET, ttl=MINUTE),
    "run_once": lambda database: database.run_once(scope(), lambda attempt: None, params=SECRET),
}


@pytest.mark.parametrize("method", CLOSED)
def test_no_frame_of_a_closed_database_shows_an_argument(sqlite_database: Database, method: str) -> None:
    """If the database is closed, each method raises without a secret, nonce, key or result in its frames."""
    sqlite_database.close()
    with pytest.raises(errors.DatabaseClosedError) as caught:
        CLOSED[method](sqlite_database)
    assert shown(caught.value) == []


def test_a_result_that_can_not_be_recorded_is_not_shown(sqlite_database: Database) -> None:
    """If the database is closed before a result is recorded, no frame holds the result of the effect."""

    def effect(attempt: homeagent.Attempt) -> str:
        sqlite_database.close()
        return SECRET

    with pytest.raises(errors.DatabaseClosedError) as caught:
        sqlite_database.run_once(scope("k"), effect)
    assert shown(caught.value) == []


def test_the_record_of_a_hash_that_is_not_replaced_shows_no_secret(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If an outdated hash can't be replaced inside a unit, no error in the log record leads to the secret."""
    sqlite_database.pair(DevicePair(id="lamp", role=Role.NODE, shared_secret=SecretStr(SECRET)))
    sqlite_database.devices.approve("lamp")
    monkeypatch.setattr(hashing, "_default", dearer)
    with sqlite_database.unit_of_work():
        assert sqlite_database.check_secret("lamp", SECRET)
    (record,) = caplog.records
    assert vars(record)["event"] == "rehash_failed"
    assert not [each for each in record.args or () if isinstance(each, BaseException) and shown(each)]
    assert "open write unit" in record.getMessage()


def test_a_programming_error_keeps_its_variables(sqlite_database: Database) -> None:
    """If an exception is not an error of the package, the frames keep all variables for debugging."""
    with pytest.raises(TypeError) as caught:
        sqlite_database.nonces.consume(None, SECRET, expires_at=START + MINUTE, nothing=1)
    assert shown(caught.value) != []
