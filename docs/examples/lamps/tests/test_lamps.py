"""Tests of the application."""

import asyncio
from typing import Any

import pytest
from fastapi.testclient import TestClient
from lamps.app import create_app
from lamps.tables import LampUnit
from pydantic import SecretStr

from homeagent import Database, DevicePair, Role
from homeagent.fastapi import bearer_token
from homeagent.handshake.client import authenticate
from homeagent.testing import FakeClock


@pytest.fixture
def homeagent_options() -> dict[str, Any]:
    return {"unit": LampUnit, "migrations": "lamps:migrations"}


def headers(device_id: str, secret: SecretStr | str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {bearer_token(device_id, secret)}", **more}


def test_lamps(homeagent_database: Database[LampUnit], homeagent_clock: FakeClock) -> None:
    admin = headers("owner", homeagent_database.pair(DevicePair(id="owner", role=Role.ADMIN)).shared_secret)
    homeagent_database.devices.approve("owner")
    with TestClient(create_app(homeagent_database)) as client:
        secret = client.post("/devices", json={"id": "a/phone", "role": "client"}).json()["secret"]
        once = headers("a/phone", secret, **{"Idempotency-Key": "1"})
        assert client.put("/lamps/hall/true", headers=once).status_code == 403
        (pending,) = client.get("/devices", headers=admin).json()
        seen = {"role": pending["role"], "paired_at": pending["paired_at"]}
        assert client.post("/devices/approve/a%2Fphone", params=seen, headers=once).status_code == 403
        assert client.post("/devices/approve/a%2Fphone", params=seen, headers=admin).json() is True
        for replayed in (None, "true"):
            reply = client.put("/lamps/hall/true", headers=once)
            assert (reply.json(), reply.headers.get("Idempotency-Replayed")) == ({"lamp": "hall", "on": True}, replayed)
        with client.websocket_connect("/ws") as socket:

            async def send(text: str) -> None:
                socket.send_text(text)

            async def receive() -> str:
                return socket.receive_text()

            asyncio.run(authenticate("a/phone", SecretStr(secret), send=send, receive=receive, clock=homeagent_clock))
            for _ in range(2):
                socket.send_json({"id": "1", "lamp": "hall", "on": False})
                assert socket.receive_json() == {"id": "1", "result": False}
            assert client.get("/lamps/hall", headers=once).json() == [True, False]
            homeagent_database.devices.revoke("a/phone")
            assert socket.receive()["code"] == 4403
        assert client.get("/lamps/hall", headers=once).status_code == 403
