"""Tests of the hub. With `pytest --homeagent-postgresql URL`, the tests run on PostgreSQL instead of SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from fastapi.testclient import TestClient
from hub.app import create_agent, create_app
from hub.stores import HubUnit
from pydantic import SecretStr, ValidationError

from alembic import command
from homeagent import Database, DevicePair, Role
from homeagent.fastapi import bearer_token
from homeagent.handshake.client import authenticate
from homeagent.testing import FakeClock


@pytest.fixture
def homeagent_options() -> dict[str, Any]:
    """Open each database with the hub's unit and revisions."""
    return {"unit": HubUnit, "migrations": "hub:migrations"}


@pytest.fixture
def database(homeagent_database: Database[HubUnit]) -> Database[HubUnit]:
    """A database with the agent of the hub."""
    homeagent_database.run(create_agent)
    return homeagent_database


@pytest.fixture
def secret(database: Database[HubUnit]) -> SecretStr:
    """The secret of the approved device `phone`."""
    paired = database.pair(DevicePair(id="phone", role=Role.CLIENT))
    database.devices.approve("phone")
    return paired.shared_secret


@pytest.fixture
def client(database: Database[HubUnit]) -> Iterator[TestClient]:
    """A client of the running application."""
    with TestClient(create_app(database)) as client:
        yield client


def test_messages_of_a_sender(database: Database[HubUnit], homeagent_clock: FakeClock) -> None:
    """A sender's messages are listed in pages, and are deleted together with the session."""
    with database.unit_of_work() as uow:
        session = uow.sessions.resolve(agent_id="butler", sender_id="anna")
        first = uow.messages.add(session.session_id, "Good evening")
        uow.messages.add(session.session_id, "Good night")
        with pytest.raises(ValidationError):
            uow.messages.add(session.session_id, "")
    assert first.sent_at == homeagent_clock()
    with database.unit_of_work() as uow:
        assert [each.text for each in uow.messages.of_sender("anna")] == ["Good evening", "Good night"]
        assert [each.text for each in uow.messages.of_sender("anna", after=first.id or 0)] == ["Good night"]
        assert uow.messages.of_sender("bert") == []
        uow.sessions.delete(session.session_id)
        assert uow.messages.of_sender("anna") == []


def test_preferences(client: TestClient, secret: SecretStr, database: Database[HubUnit]) -> None:
    """A device reads and replaces its preferences, which are deleted together with the device."""
    headers = {"Authorization": f"Bearer {bearer_token('phone', secret)}"}
    assert client.put("/preferences/volume", json={"value": 3}).status_code == 401
    for value in (3, {"left": 1}):
        assert client.put("/preferences/volume", json={"value": value}, headers=headers).status_code == 204
    assert client.get("/preferences", headers=headers).json() == {"volume": {"left": 1}}
    with database.unit_of_work() as uow:
        uow.devices.delete("phone")
        assert uow.preferences.of_device("phone") == {}


def test_a_message_is_stored_once(client: TestClient, secret: SecretStr, homeagent_clock: FakeClock) -> None:
    """A device that sends a message again with the same key gets the same reply."""
    with client.websocket_connect("/ws") as socket:

        async def send(text: str) -> None:
            socket.send_text(text)

        async def receive() -> str:
            return socket.receive_text()

        asyncio.run(authenticate("phone", secret, send=send, receive=receive, clock=homeagent_clock))
        replies = []
        for text in ("Good evening", "Good evening", "Good night"):
            socket.send_json({"key": "k-1", "text": text})
            replies.append(socket.receive_json())
    assert replies[0] == replies[1]
    assert replies[2] == {"key": "k-1", "error": "FingerprintMismatchError"}
    headers = {"Authorization": f"Bearer {bearer_token('phone', secret)}"}
    (stored,) = client.get("/messages", headers=headers).json()
    assert (stored["id"], stored["text"]) == (replies[0]["id"], "Good evening")


def test_the_revisions_create_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alembic check` finds no difference between the classes and the revisions."""
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    command.check(Config(toml_file=Path(__file__).parents[1] / "pyproject.toml"))
