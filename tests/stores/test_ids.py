"""Ids and labels: as they are in the field, as long as is allowed, and in rows that break the rules."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest

from homeagent import (
    AgentCreate,
    AgentPublic,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentUpdate,
    Database,
    DeviceCreate,
    DevicePublic,
    DeviceUpdate,
    IdempotencyScope,
    Role,
)
from homeagent.credentials.secret_format import generate_secret
from homeagent.errors import AgentNotFoundError, DeviceNotFoundError, InvalidArgumentError, SessionNotFoundError
from tests.conftest import START, add_agent, add_device, write_past_checks

MINUTE = timedelta(minutes=1)

IDS = [
    "pKq3+/Ylz0mVZ1v8hT5uUQ==",  # a public key in base64
    "octo-org/home.assistant",
    "plant-7/line 2/plc:4",
    "a:1-msteams_" + "tDq9xK" * 52 + "@x",  # a conversation of Teams, which has 325 characters
    "<CAF+d=41+q/x@mail.example.org>",  # a Message-ID
    "zigbee/0x00158d0001ab12cd",
    "uuid:2f402f80-da50-11e1-9b23-001788255acc::upnp:rootdevice",
    "Büro (2)/Lampe #1, warmweiß",
    "käse/家/خانه\u200cها",
    "\U0001f469\u200d\u2764\ufe0f\u200d\U0001f468",
    "...",
    "/srv//a",
]
JWT = "eyJhbGciOiJSUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0" * 30 + ".c2ln-_"
SENDERS = ["\u202a+49 170 1234567\u202c", "\u200e+1\u2011555\u200f", "#room:matrix.org\u2060", " " + "x" * 1023]


def test_ids_as_they_are_in_the_field(database: Database) -> None:
    """Each store finds and deletes rows by such ids, also by senders and channels with bidirectional marks."""
    for identifier in IDS:
        add_device(database, identifier, approved=True)
        add_agent(database, identifier)
        scope = IdempotencyScope(identifier, "m", identifier)
        with database.unit_of_work() as unit:
            unit.sessions.create(AgentSessionCreate(session_id=identifier, agent_id=identifier, sender_id=identifier))
            unit.idempotency_keys.insert(scope, 1, ttl=MINUTE)
            assert unit.nonces.consume(identifier, identifier, expires_at=START + MINUTE)
        assert DevicePublic.model_validate(database.devices.get(identifier)).id == identifier
        assert database.sessions.get(identifier).agent_id == database.agents.get(identifier).id == identifier
        assert database.idempotency_keys.find(scope) is not None
        assert database.nonces.find(identifier, identifier) is not None
        assert database.devices.delete(identifier)
        assert database.agents.delete(identifier, delete_sessions=True)
    add_agent(database)
    for number, sender in enumerate(SENDERS):
        route: dict[str, Any] = {"agent_id": "ada", "sender_id": sender, "channel_id": sender[::-1]}
        database.sessions.create(AgentSessionCreate(session_id=f"{JWT}{number}", **route))
        found = database.sessions.resolve(**route)
        assert (found.session_id, found.sender_id) == (f"{JWT}{number}", sender)
        assert database.sessions.list(sender_id=sender) == [found]


def test_the_longest_texts_are_stored(database: Database) -> None:
    """Texts of the maximum length fit into every index, also if the server can't compress the texts."""
    noise = random.Random(7)
    alphabet = [chr(code) for code in range(0x4E00, 0x9F00)]

    def text(octets: int) -> str:
        return "".join(noise.choices(alphabet, k=octets // 3)) + "x" * (octets % 3)

    device_id, agent_id, method, name = (text(512) for _ in range(4))
    session_id, sender_id, channel_id, nonce, key = (text(1024) for _ in range(5))
    scope = IdempotencyScope(device_id, method, key)
    with database.unit_of_work() as unit:
        unit.devices.create(DeviceCreate(id=device_id, role=Role.NODE, shared_secret_hash=text(512)))
        unit.devices.revoke(device_id, reason=text(512))
        unit.agents.create(AgentCreate(id=agent_id, name=name, workspace_path=text(4096)))
        unit.sessions.create(
            AgentSessionCreate(session_id=session_id, agent_id=agent_id, sender_id=sender_id, channel_id=channel_id)
        )
        unit.nonces.consume(device_id, nonce, expires_at=START + MINUTE)
        unit.idempotency_keys.insert(scope, None, ttl=MINUTE)
    found = database.sessions.resolve(agent_id=agent_id, sender_id=sender_id, channel_id=channel_id)
    assert found.session_id == session_id
    assert database.idempotency_keys.find(scope) is not None
    assert database.nonces.find(device_id, nonce) is not None


def test_a_search_takes_every_text(database: Database) -> None:
    """If no row has the text, a method that reads, changes or deletes finds no row, and the unit stays usable."""
    for absent in ("", "x" * 100_000, "nul\0", "a/../b", "\ud800", "\ud800\0"):
        with database.unit_of_work() as unit:
            devices, agents, sessions = unit.devices, unit.agents, unit.sessions
            for store in (devices, agents, sessions):
                assert store.find_by_id(absent) is None
                assert store.delete(absent) is False
            for device_call in (devices.get, devices.approve, devices.revoke):
                with pytest.raises(DeviceNotFoundError) as caught:
                    device_call(absent)
                assert caught.value.device_id == absent
                assert len(str(caught.value)) < 2000
            with pytest.raises(DeviceNotFoundError):
                devices.update(absent, DeviceUpdate(metadata=1))
            for with_patch in (False, True):
                with pytest.raises(AgentNotFoundError) as no_agent:
                    _ = agents.update(absent, AgentUpdate(name="Any")) if with_patch else agents.get(absent)
                assert no_agent.value.agent_id == absent
            with pytest.raises(AgentNotFoundError):
                sessions.resolve(agent_id=absent)
            with pytest.raises(SessionNotFoundError):
                sessions.get(absent)
            assert devices.update_last_seen(absent) is sessions.touch(absent) is False
            assert sessions.list(agent_id=absent) == sessions.list(sender_id=absent) == []
            assert unit.nonces.find(absent, absent) is None
            assert unit.nonces.forget(absent) == 0
            scope = IdempotencyScope.of_record(absent, absent, absent)
            assert unit.idempotency_keys.find(scope) is None
            assert unit.idempotency_keys.forget(scope) is False
            with pytest.raises(InvalidArgumentError):
                unit.idempotency_keys.insert(scope, 1, ttl=MINUTE)
        assert database.check_secret(absent, generate_secret()).status == "denied"
        assert database.check_proof(absent, nonce="n", timestamp=START, proof=bytes(32)).status == "denied"
        assert database.proof_parameters(absent).iterations == 4096
        with pytest.raises(DeviceNotFoundError):
            database.rotate_secret(absent)


@pytest.mark.parametrize("odd", ["tab\there", "a/../b", "pho\u202ene", "x" * 600, "nul\0"], ids=ascii)
def test_rows_that_break_the_rules(database: Database, target: str, odd: str) -> None:
    """If another version stored an id that no new row can have, each method reads, changes and deletes the row."""
    if "://" in target and "\0" in odd:
        pytest.skip("PostgreSQL stores no NUL")
    add_device(database, "lamp", role=Role.ADMIN)
    add_agent(database)
    scope = IdempotencyScope("lamp", "m", "k")
    with database.unit_of_work() as unit:
        unit.sessions.create(AgentSessionCreate(session_id="s", agent_id="ada"))
        unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        unit.idempotency_keys.claim(scope, fingerprint="f", lease=timedelta(0), ttl=MINUTE)
    stored = (
        " || ".join(f"chr({ord(each)})" for each in odd)
        if "://" in target
        else f"CAST(x'{odd.encode().hex()}' AS TEXT)"
    )
    write_past_checks(
        target,
        # A change of the device's id would delete the keys of the id.
        f"UPDATE idempotency_keys SET device_id = {stored}, method = {stored}, key = {stored}",
        f"UPDATE devices SET id = {stored}",
        f"UPDATE sessions SET session_id = {stored}, sender_id = {stored}, route_key = NULL",
        f"UPDATE nonces SET device_id = {stored}, nonce = {stored}",
    )
    with database.unit_of_work() as unit:
        assert DevicePublic.model_validate(unit.devices.get(odd)).id == odd
        assert unit.devices.approve(odd)
        assert unit.devices.update(odd, DeviceUpdate(metadata=1)).metadata_ == 1
        assert unit.devices.update_last_seen(odd)
        assert [device.id for device in unit.devices.list(after="")] == [odd]
        assert unit.devices.list(after=odd) == []
        session = unit.sessions.get(odd)
        assert AgentSessionPublic.model_validate(session).sender_id == odd
        assert AgentPublic.model_validate(unit.agents.get("ada")).id == "ada"
        assert unit.sessions.list(sender_id=odd) == [session]
        assert unit.sessions.resolve(agent_id="ada", sender_id=odd).session_id == odd
        assert unit.nonces.find(odd, odd) is not None
        (abandoned,) = unit.idempotency_keys.list_abandoned()
        scope = IdempotencyScope.of_record(abandoned.device_id, abandoned.method, abandoned.key)
        assert unit.idempotency_keys.resolve(scope, 5)
        record = unit.idempotency_keys.find(scope)
        assert record is not None
        assert record.result == 5
        assert unit.devices.revoke(odd, force=True)
        assert unit.devices.delete(odd)
        assert unit.sessions.delete(odd)
    assert database.check_secret(odd, generate_secret()).status == "denied"
