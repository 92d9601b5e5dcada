"""Tests of the gateway."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from gateway.app import create_app
from gateway.readings import GatewayUnit, ReadingStore
from pydantic import SecretStr, ValidationError
from starlette.testclient import WebSocketTestSession

from homeagent import Database, DevicePair, Role
from homeagent.handshake.client import authenticate
from homeagent.testing import FakeClock


@pytest.fixture
def homeagent_options() -> dict[str, Any]:
    return {"unit": GatewayUnit, "migrations": "gateway:migrations"}


@pytest.fixture
def secret(homeagent_database: Database) -> SecretStr:
    paired = homeagent_database.pair(DevicePair(id="thermometer", role=Role.NODE))
    homeagent_database.devices.approve("thermometer")
    return paired.shared_secret


def test_latest(homeagent_database: Database, homeagent_clock: FakeClock, secret: SecretStr) -> None:
    readings = homeagent_database.store(ReadingStore)
    readings.add("thermometer", 20.5)
    homeagent_clock.advance(minutes=1)
    readings.add("thermometer", 21.5)
    new, old = readings.latest("thermometer")
    assert (new.celsius, old.celsius) == (21.5, 20.5)
    assert new.measured_at - old.measured_at == timedelta(minutes=1)
    with pytest.raises(ValidationError):
        readings.add("thermometer", 100)


def sign_in(connection: WebSocketTestSession, secret: SecretStr, clock: FakeClock) -> None:
    async def send(text: str) -> None:
        connection.send_text(text)

    async def receive() -> str:
        return connection.receive_text()

    asyncio.run(authenticate("thermometer", secret, send=send, receive=receive, clock=clock))


def test_websocket(homeagent_database: Database[GatewayUnit], homeagent_clock: FakeClock, secret: SecretStr) -> None:
    app = create_app(homeagent_database)
    with TestClient(app) as client, client.websocket_connect("/ws") as connection:
        sign_in(connection, secret, homeagent_clock)
        connection.send_text("20.5")
        assert connection.receive_text() == "mean of 1: 20.5"
        connection.send_text("warm")
        assert connection.receive_text() == "The text is not a temperature."
        homeagent_database.devices.revoke("thermometer")
        assert connection.receive()["code"] == 4403


def test_health(homeagent_database: Database[GatewayUnit]) -> None:
    with TestClient(create_app(homeagent_database)) as client:
        assert client.get("/health").json() == {"status": "ok"}
