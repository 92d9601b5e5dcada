"""The API of `docs/examples/api.py`, over HTTP. `test_deployment.py` runs the API in real servers."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from homeagent import Database, DevicePair, Role
from homeagent.fastapi import bearer_token
from tests.asgi import Client

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "api.py"
SECRET = "correct horse battery staple"


@functools.cache
def load_example() -> Any:
    """Import the example from its file, once for all tests."""
    spec = importlib.util.spec_from_file_location("example_api", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Api(Client):
    """A client with the credentials of an administrator, which keeps the text of each response."""

    def __init__(self, database: Database) -> None:
        super().__init__(load_example().create_app(database), database)
        boss = database.pair(DevicePair(id="boss", role=Role.ADMIN))
        database.devices.approve("boss")
        self.headers["Authorization"] = f"Bearer {bearer_token('boss', boss.shared_secret)}"
        self.bodies: list[str] = []

    def request(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request, and keep the text of the response."""
        response = super().request(method, path, **request)
        self.bodies.append(response.text)
        return response

    def patch(self, path: str, **request: Any) -> httpx.Response:
        """Send a PATCH request."""
        return self.request("PATCH", path, **request)

    def delete(self, path: str, **request: Any) -> httpx.Response:
        """Send a DELETE request."""
        return self.request("DELETE", path, **request)


@pytest.fixture
def database(sqlite_path: Path) -> Iterator[Database]:
    with Database.open(sqlite_path) as database:
        yield database


@pytest.fixture
def api(database: Database) -> Api:
    return Api(database)


def test_devices(api: Api) -> None:
    """A device pairs, is approved with the values that were shown, and is revoked."""
    paired = api.post("/devices", json={"id": "lamp", "role": "node", "metadata": {"room": "hall"}})
    assert paired.status_code == 201
    device = paired.json()["device"]
    assert (device["approved"], device["status"], device["metadata"]) == (False, "pending", {"room": "hall"})
    assert len(paired.json()["shared_secret"]) >= 32
    assert paired.headers["cache-control"] == "no-store"

    seen = {"expected_role": "node", "expected_paired_at": device["paired_at"]}
    other = api.post("/devices/approve/lamp", params={**seen, "expected_role": "admin"})
    assert (other.status_code, other.json()["error"]) == (409, "ApprovalChangedError")
    assert api.post("/devices/approve/lamp", params=seen).json() == {"changed": True}
    assert api.post("/devices/approve/lamp", params=seen).json() == {"changed": False}
    assert [found["id"] for found in api.get("/devices", params={"status": "approved"}).json()] == ["boss", "lamp"]

    assert api.patch("/devices/lamp", json={"metadata": None}).json()["metadata"] is None
    assert api.post("/devices/revoke/lamp", params={"reason": "lost"}).json() == {"changed": True}
    assert api.get("/devices/lamp").json()["revoked_reason"] == "lost"
    stale = api.post("/devices/approve/lamp", params=seen)
    assert (stale.status_code, stale.json()["error"]) == (409, "ApprovalChangedError")
    assert api.get("/devices/lamp").json()["status"] == "revoked"
    again = {**seen, "expected_status": "revoked"}
    assert api.post("/devices/approve/lamp", params=again).json() == {"changed": True}


def test_agents_and_sessions(api: Api) -> None:
    """An agent is created, changed and removed with its sessions; a route has one session; pages follow each other."""
    body = {"id": "a1", "name": "Anna", "workspace_path": "/srv/a1", "config": {"b": 1, "a": [None, -0.5]}}
    assert api.post("/agents", json=body).status_code == 201
    assert api.patch("/agents/a1", json={"name": "Berta"}).json()["config"] == body["config"]
    assert [agent["name"] for agent in api.get("/agents").json()] == ["Berta"]

    route = {"agent_id": "a1", "sender_id": "s1", "channel_id": "main"}
    resolved = api.post("/sessions/resolve", params=route).json()
    assert api.post("/sessions/resolve", params=route).json() == resolved
    for number in range(3):
        created = api.post("/sessions", json={"agent_id": "a1", "session_id": f"s-{number}"})
        assert created.status_code == 201
    first = api.get("/sessions", params={"agent_id": "a1", "limit": 2}).json()
    last = first[-1]
    assert api.post(f"/sessions/touch/{last['session_id']}").status_code == 200
    after = {"after": last["session_id"], "after_active_at": last["last_active_at"]}
    rest = api.get("/sessions", params={"agent_id": "a1", **after}).json()
    found = [session["session_id"] for session in first + rest]
    assert sorted(found) == sorted([resolved["session_id"], "s-0", "s-1", "s-2"])

    refused = api.delete("/agents/a1")
    assert (refused.status_code, refused.json()["error"]) == (409, "AgentInUseError")
    assert api.delete("/agents/a1", params={"delete_sessions": True}).json() == {"changed": True}
    assert api.get("/sessions").json() == []


IDENTIFIERS = ("site/line/plc", "/a//b+c==", "50%2F?x#y", "approve/x", "käse/é", "a:1" * 170)


def test_an_id_is_one_encoded_part_of_the_path(api: Api) -> None:
    """An id with slashes or other reserved characters is percent-encoded at the end of the path."""
    for identifier in IDENTIFIERS:
        encoded = quote(identifier, safe="")
        device = api.post("/devices", json={"id": identifier, "role": "node"}).json()["device"]
        assert api.get(f"/devices/{encoded}").json()["id"] == identifier
        seen = {"expected_role": "node", "expected_paired_at": device["paired_at"]}
        assert api.post(f"/devices/approve/{encoded}", params=seen).json() == {"changed": True}
        assert api.post(f"/devices/revoke/{encoded}").json() == {"changed": True}
        api.post("/agents", json={"id": identifier, "name": "A", "workspace_path": "/srv"})
        assert api.patch(f"/agents/{encoded}", json={"name": "B"}).json()["id"] == identifier
        session = api.post("/sessions", json={"session_id": identifier, "agent_id": identifier}).json()
        assert api.get(f"/sessions/{encoded}").json() == session
        assert api.post(f"/sessions/touch/{encoded}").status_code == 200
        assert api.delete(f"/agents/{encoded}", params={"delete_sessions": True}).json() == {"changed": True}


REFUSED = (
    ("GET", "/devices/nobody", 404, "DeviceNotFoundError"),
    ("PATCH", "/agents/nobody", 404, "AgentNotFoundError"),
    ("POST", "/sessions/touch/nothing", 404, "SessionNotFoundError"),
    ("POST", "/sessions/resolve?agent_id=nobody", 404, "AgentNotFoundError"),
    ("GET", "/devices/..%0A", 404, "DeviceNotFoundError"),
    ("GET", "/sessions?limit=0", 422, "RequestValidationError"),
    ("POST", "/devices/approve/x?expected_role=node&expected_paired_at=2026-01-01", 422, "RequestValidationError"),
    ("POST", "/devices", 422, "RequestValidationError"),
)


def test_refusals(api: Api) -> None:
    """An absent row is a 404 and a bad argument a 422, each as problem details without the refused values."""
    for method, path, status, error in REFUSED:
        body = {"PATCH": {}, "POST": {"id": "a/..", "role": SECRET, "shared_secret": [SECRET]}}.get(method)
        response = api.request(method, path, json=body)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), path
        assert response.json()["error"] == error
        assert response.json()["detail"]
        assert all(set(line) == {"type", "loc", "msg"} for line in response.json().get("errors", []))
    assert SECRET not in "".join(api.bodies)


def test_who_may_call(api: Api, database: Database) -> None:
    """Every path except pairing and the health check needs an approved device, and most need an administrator."""
    client = database.pair(DevicePair(id="phone", role=Role.CLIENT))
    phone = {"Authorization": f"Bearer {bearer_token('phone', client.shared_secret)}"}
    paths = api.get("/openapi.json").json()["paths"]
    calls = [(method, path) for path, methods in paths.items() for method in methods]
    is_open = {("post", "/devices"), ("get", "/health")}
    for headers, status in (({"Authorization": ""}, 401), (phone, 403)):
        answers = {call: api.request(*call, headers=headers).status_code for call in calls if call not in is_open}
        assert set(answers.values()) == {status}, answers
    database.devices.approve("phone")
    allowed = {call for call in calls if api.request(*call, headers=phone).status_code != 403}
    assert {path for _, path in allowed - is_open} == {
        "/agents", "/agents/{agent_id}", "/sessions", "/sessions/{session_id}", "/sessions/touch/{session_id}",
        "/sessions/resolve",
    }  # fmt: skip
    assert {method for method, path in allowed if path.startswith("/agents")} == {"get"}


def test_no_hash_and_no_secret_is_returned(api: Api, database: Database) -> None:
    """No response or schema has a hash or a verifier; a generated secret is in one response, a sent one in none."""
    made = api.post("/devices", json={"id": "made", "role": "admin"}).json()
    api.post("/devices", json={"id": "sent", "role": "node", "shared_secret": SECRET})
    seen = {"expected_role": "admin", "expected_paired_at": made["device"]["paired_at"]}
    api.post("/devices/approve/made", params=seen)
    database.rotate_secret("made", overlap=timedelta(hours=1))
    with database.unit_of_work(read_only=True) as unit:
        rows = [unit.devices.get("made"), unit.devices.get("sent")]
    hidden = [row.shared_secret_hash for row in rows] + [rows[0].previous_secret_hash, rows[0].proof_verifier]
    assert all(hidden)
    api.post("/devices", json={"id": "made", "role": "admin"})
    for path in ("/devices", "/devices/made", "/devices/sent", "/openapi.json", "/docs"):
        assert api.get(path).status_code == 200
    api.patch("/devices/sent", json={"metadata": {"room": "hall"}})
    api.post("/devices/revoke/made")
    api.post("/devices/revoke/sent")

    text = "".join(api.bodies)
    for value in hidden:
        assert str(value) not in text
    assert SECRET not in text
    assert text.count(made["shared_secret"]) == 1
    assert "hash" not in text.lower()
    assert "verifier" not in text.lower()

    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    holders = {name for name, schema in schemas.items() if "secret" in str(schema.get("properties", {})).lower()}
    assert holders == {"DevicePair", "PairReply"}
    assert {"AgentCreate", "AgentPublic", "AgentUpdate", "DevicePublic", "DeviceUpdate", "AgentSessionPublic"} <= set(
        schemas
    )
