"""Arguments that a store refuses before a statement, and rows that exist or do not exist. Each case changes no row."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any

import pytest

from homeagent import (
    Agent,
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    AgentUpdate,
    Database,
    Device,
    DeviceCreate,
    DevicePair,
    DeviceUpdate,
    IdempotencyKey,
    IdempotencyScope,
    Outcome,
    Role,
    errors,
)
from tests.conftest import START, add_agent, add_device, dump

MINUTE = timedelta(minutes=1)
NAIVE = START.replace(tzinfo=None)
SCOPE = IdempotencyScope("lamp", "on", "key-1")
CREATE = DeviceCreate(id="new", role=Role.NODE, shared_secret_hash="h")
ROWS: dict[str, Any] = {
    "devices": Device(id="new", role=Role.NODE, shared_secret_hash="h", paired_at=START, approved=True),
    "agents": Agent(id="new", name="New", workspace_path="/new", created_at=START),
    "sessions": AgentSession(session_id="new", agent_id="ada", created_at=START, last_active_at=START),
}
RECORD = IdempotencyKey(key="k", method="m", device_id="d", result=1, created_at=START, expires_at=START)
NO_ATTEMPTS = [SCOPE, RECORD, Outcome(value=1, replayed=False, attempt=1), None]
NO_TEXTS: list[Any] = [7, None, b"lamp", [], {"id": "lamp"}]
SECRET: dict[str, Any] = {"expected_secret_hash": "sha256$of-lamp", "secret_hash": "new", "proof_verifier": None}
Call = Callable[[Any], object]


def each(
    match: str, methods: str, values: list[Any], *before: Any, by: str = "", **options: Any
) -> list[tuple[str, Call]]:
    """Return a case for each method and value: the value is the argument `by`, or the argument after `before`."""

    def call(unit: Any, method: str, value: Any) -> object:
        store, name = method.split(".")
        arguments = before if by else (*before, value)
        return getattr(getattr(unit, store), name)(*arguments, **{**options, **({by: value} if by else {})})

    cases = product(methods.split(), values)
    return [(match, partial(lambda method, value, unit: call(unit, method, value), *case)) for case in cases]


CASES: list[tuple[str, Call]] = [
    # Another type than the method expects
    *each(
        "DeviceCreate", "devices.create", [{"id": "new"}, DevicePair(id="new", role=Role.NODE), ROWS["devices"], None]
    ),
    *each("AgentCreate", "agents.create", [{"id": "new"}, ROWS["agents"], None]),
    *each("AgentSessionCreate", "sessions.create", [{"agent_id": "ada"}, ROWS["sessions"], None]),
    *each("DeviceUpdate", "devices.update", [{"metadata": 1}, AgentUpdate(name="Lamp"), None], "lamp"),
    *each("AgentUpdate", "agents.update", [{"name": "New"}, DeviceUpdate(metadata=1), None], "ada"),
    *each("AgentSessionUpdate", "sessions.update", [{"metadata": 1}], "s1"),
    *each("not NoneType", "sessions.index", [None]),
    *each("", "idempotency_keys.find", [("lamp", "on", "key-1")]),
    *each("Attempt", "idempotency_keys.release idempotency_keys.find_recorded", NO_ATTEMPTS),
    *each("Attempt", "idempotency_keys.renew", NO_ATTEMPTS, lease=MINUTE),
    *each("Attempt", "idempotency_keys.complete", NO_ATTEMPTS, by="attempt", result=1),
    *each("Attempt", "idempotency_keys.fail", NO_ATTEMPTS, by="attempt", error=1),
    # A client's JSON can have a list, an object or another value as an id.
    *each("must be text, not", "devices.find_by_id devices.get devices.delete", NO_TEXTS),
    *each("must be text, not", "agents.find_by_id agents.get agents.delete", NO_TEXTS),
    *each("must be text, not", "sessions.find_by_id sessions.get sessions.delete", NO_TEXTS),
    *each("must be text, not", "nonces.consume", NO_TEXTS, by="device_id", nonce="n", expires_at=START),
    # Limits and cursors
    *each("limit", "agents.list", [0, -1, True, 1.0, "1", None, 2**31], by="limit"),
    *each("limit", "devices.list sessions.list", [0, -1, True], by="limit"),
    *each("limit", "nonces.delete_expired idempotency_keys.delete_expired", [0, -1, True], by="limit"),
    *each("limit", "nonces.consume", [0, -1, True], "lamp", "n", by="limit", expires_at=START + MINUTE),
    # Of an expired or stale message too
    *each("limit", "nonces.consume", [0, True], "lamp", "n", by="limit", expires_at=START),
    *each("limit", "nonces.consume_signed", [0], "lamp", "n", by="limit", signed_at=START - 2 * MINUTE, skew=MINUTE),
    *each("", "sessions.list", ["s1"], by="after"),
    # Flags
    *each("^force must be True or False, not", "devices.delete devices.revoke", ["no", 0.5, None], "root", by="force"),
    *each("delete_sessions", "agents.delete", ["no", 1], "ada", by="delete_sessions"),
    *each("rerun", "idempotency_keys.claim", ["no"], SCOPE, by="rerun", fingerprint="f", lease=MINUTE, ttl=MINUTE),
    *each("approved", "devices.list", [1, "yes"], by="approved"),
    # Values of devices
    *each("^role must be one of client, node, admin$", "devices.list", ["root"], by="role"),
    *each("^status must be one of pending, approved, revoked$", "devices.list", ["root"], by="status"),
    *each("", "devices.list", ["last_seen_at"], by="order"),
    *each("seen_before", "devices.list", [NAIVE], by="seen_before"),
    *each("^expected_role must be one of", "devices.approve", ["root"], "lamp", by="expected_role"),
    *each("^expected_status must be one of", "devices.approve", ["gone"], "lamp", by="expected_status"),
    *each("expected_", "devices.approve", [NAIVE], "lamp", by="expected_paired_at"),
    *each("expected_", "devices.approve", [5], "lamp", by="expected_secret_hash"),
    *each("", "devices.revoke", ["", "x" * 513, "line\n"], "lamp", by="reason"),
    *each("aware", "devices.update_last_seen", [NAIVE], "lamp"),
    *each("previous_until", "devices.set_secret", [NAIVE], "lamp", by="previous_until", **SECRET),
    *each("proof_verifier", "devices.set_secret", [5], "lamp", by="proof_verifier", **SECRET),
    *each("secret_hash", "devices.set_secret", [""], "lamp", by="secret_hash", **SECRET),
    *each("", "devices.rehash_secret", [""], "lamp", by="secret_hash", expected_secret_hash="sha256$of-lamp"),
    # Values of sessions, nonces and idempotency keys
    *each("", "sessions.resolve", ["", "x" * 1025, "nul\0", "\ud800"], agent_id="ada", by="sender_id"),
    *each("", "sessions.resolve", ["", "x" * 1025, "nul\0", "\ud800"], agent_id="ada", by="channel_id"),
    *each("aware", "sessions.touch", [NAIVE], "s1"),
    *each("", "sessions.move", ["", "nul\0", 7], "s1", by="sender_id"),
    *each("", "nonces.consume", ["", "a/..", "x" * 513], by="device_id", nonce="n", expires_at=START + MINUTE),
    *each("", "nonces.consume", ["", "x" * 1025, "\0"], "d", expires_at=START + MINUTE),
    *each("aware", "nonces.consume", [NAIVE], "lamp", "n", by="expires_at"),
    *each("", "idempotency_keys.insert", [timedelta(0), -MINUTE, timedelta.max, 60], SCOPE, 1, by="ttl"),
    *each("", "idempotency_keys.insert", [math.nan, {1: 2}, b"bytes", "x" * (1024 * 1024 - 1)], SCOPE, ttl=MINUTE),
]


@pytest.fixture
def filled(database: Database) -> Database:
    """A database with two devices, an agent, two sessions and a record."""
    add_device(database)
    add_device(database, "root", role=Role.ADMIN, approved=True)
    add_agent(database)
    database.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada"))
    database.sessions.create(AgentSessionCreate(session_id="s3", agent_id="ada", sender_id="ann"))
    database.idempotency_keys.insert(SCOPE, 1, ttl=MINUTE)
    return database


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_refused_arguments(filled: Database) -> None:
    """An argument of a wrong type or with an invalid value raises an error. SQLite only: no statement runs."""
    before = dump(filled)
    with filled.unit_of_work() as unit:
        for match, call in CASES:
            with pytest.raises(errors.InvalidArgumentError, match=match or None):
                call(unit)
    for request in ({"id": "new"}, CREATE, None):
        with pytest.raises(errors.InvalidArgumentError, match="DevicePair"):
            filled.pair(request)  # type: ignore[arg-type]  # on purpose
    wrongs: list[Any] = [7, None, []]
    for wrong in wrongs:
        with pytest.raises(errors.InvalidArgumentError, match="must be text, not"):
            filled.check_secret(wrong, "a guess of a secret")
    assert dump(filled) == before


def test_taken_ids_and_absent_agents(filled: Database) -> None:
    """If a row exists, is absent or is in use, the error has the ids of the row, but not the key of a call."""
    before = dump(filled)
    device = DeviceCreate(id="lamp", role=Role.ADMIN, shared_secret_hash="sha256$other")
    agent = AgentCreate(id="ada", name="Other", workspace_path="/else")
    sessions = [AgentSessionCreate(session_id="s1", agent_id="ada", sender_id=sender) for sender in (None, "another")]
    absent = AgentSessionCreate(agent_id="nobody")
    cases: list[tuple[type[errors.HomeAgentError], dict[str, object], list[tuple[str, Call]]]] = [
        (errors.DeviceExistsError, {"device_id": "lamp"}, each("", "devices.create", [device])),
        (errors.AgentExistsError, {"agent_id": "ada"}, each("", "agents.create", [agent])),
        (errors.SessionExistsError, {"session_id": "s1"}, each("", "sessions.create", [*sessions])),
        (errors.AgentNotFoundError, {"agent_id": "nobody"}, each("", "sessions.create", [absent])),
        (errors.AgentNotFoundError, {"agent_id": "nobody"}, each("", "sessions.start", ["nobody"], by="agent_id")),
        (errors.AgentNotFoundError, {"agent_id": "nobody"}, each("", "sessions.move", ["s1"], agent_id="nobody")),
        (errors.SessionNotFoundError, {"session_id": "s2"}, each("", "sessions.move", ["s2"], agent_id="nobody")),
        (errors.RouteTakenError, {"session_id": "s1"}, each("", "sessions.move", [None], "s3", by="sender_id")),
        (errors.AgentInUseError, {"agent_id": "ada", "session_count": 2}, each("", "agents.delete", ["ada"])),
        (errors.LastAdminError, {"device_id": "root"}, each("", "devices.delete", ["root"])),
        (errors.LastAdminError, {"device_id": "root"}, each("", "devices.revoke", ["root"])),
        (
            errors.IdempotencyKeyExistsError,
            {"device_id": "lamp", "method": "on"},
            each("", "idempotency_keys.insert", [1], SCOPE, ttl=MINUTE),
        ),
    ]
    with filled.unit_of_work() as unit:
        for error, names, calls in cases:
            for _, call in calls:
                with pytest.raises(error) as caught:
                    call(unit)
                assert {name: getattr(caught.value, name) for name in names} == names
                assert SCOPE.key not in str(caught.value)
    assert dump(filled) == before
