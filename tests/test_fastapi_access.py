"""The lifespan, the health route and the authentication of devices. Nobody without an approved device gets in."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import pytest
from fastapi import Depends, FastAPI
from pydantic import SecretStr

from homeagent import Database, Device, Limits, Role, errors
from homeagent.fastapi import (
    CurrentDevice,
    DatabaseDep,
    bearer_token,
    get_database,
    health_router,
    install_error_handlers,
    lifespan,
    require_role,
)
from homeagent.maintenance import BackupSchedule
from homeagent.testing import DatabaseFactory
from tests.asgi import Client
from tests.conftest import pair
from tests.credentials.conftest import cheap_hashes as cheap_hashes

pytestmark = pytest.mark.usefixtures("cheap_hashes")

PASSWORD = "pass:wörd 8"


def basic(device_id: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{quote(device_id, safe='')}:{secret}".encode()).decode()


def make_app() -> FastAPI:
    """Return an application with a route for every device and a route for administrators."""
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(health_router)

    @app.get("/me")
    async def me(device: CurrentDevice) -> str:
        return device.id

    @app.get("/admin")
    async def admin(device: Annotated[Device, Depends(require_role(Role.ADMIN))]) -> str:
        return device.id

    return app


@pytest.fixture
def database(homeagent_factory: DatabaseFactory) -> Database:
    """A store with an approved client, whose id has characters that need an escape, and a person's secret."""
    database = homeagent_factory(limits=Limits(failed_checks_per_minute=2))
    pair(database, "klaus:é", SecretStr(PASSWORD))
    return database


@pytest.fixture
def client(database: Database) -> Client:
    return Client(make_app(), database)


def generated(database: Database, device_id: str, **options: Any) -> str:
    """Pair a device, and return the text for the header Authorization."""
    return "Bearer " + bearer_token(device_id, pair(database, device_id, **options))


def test_both_schemes(client: Client, database: Database) -> None:
    """Bearer has id and secret in base64url; Basic has the percent-encoded id, and the secret may have a colon."""
    assert client.get("/me", headers={"Authorization": basic("klaus:é", PASSWORD)}).json() == "klaus:é"
    token = generated(database, "lamp")
    assert client.get("/me", headers={"Authorization": token}).json() == "lamp"
    assert client.get("/me", headers={"Authorization": token.replace("Bearer", "bEARER")}).json() == "lamp"


WRONG = [
    "", "Bearer", "Bearer x", "Bearer ünï", "Bearer bGFtcA.%%", "Bearer bGFtcA.//8",
    *("Bearer " + bearer_token(*pair) for pair in (
        ("lamp", "wrong"), ("klaus:é", "a wrong secret"), ("nobody", "a wrong secret"), ("a\nb", "a wrong secret"),
        ("lamp", ""),
    )),
    "Bearer " + "a" * 9000, "Basic !!!", "Digest lamp",
    *("Basic " + base64.b64encode(text).decode() for text in (b"lamp", b"%ff:x")),
]  # fmt: skip


def test_wrong_credentials_get_the_same_reply(client: Client, database: Database) -> None:
    """Absent, malformed and wrong credentials, two headers, and an unknown device get the same reply."""
    token = generated(database, "lamp")
    without = client.get("/me")
    assert (without.status_code, without.json()["error"]) == (401, "AuthenticationError")
    assert without.headers["www-authenticate"].startswith("Bearer ")
    for header in WRONG:
        response = client.get("/me", headers=[("Authorization", header.encode())] if header else None)
        assert (response.status_code, response.text) == (401, without.text), header
    # Neither of two headers with credentials counts.
    assert client.get("/me", headers=[("Authorization", token), ("Authorization", token)]).status_code == 401


def test_pending_and_revoked_devices_learn_their_state(client: Client, database: Database) -> None:
    """A pending or revoked device with the right secret is refused and learns why; with a wrong secret it doesn't."""
    token = generated(database, "lamp", approve=False)
    waiting = client.get("/me", headers={"Authorization": token})
    assert (waiting.status_code, waiting.json()["error"]) == (403, "AccessDeniedError")
    assert "waits for an administrator's approval" in waiting.json()["detail"]
    database.devices.approve("lamp")
    assert client.get("/me", headers={"Authorization": token}).status_code == 200
    database.devices.revoke("lamp")
    revoked = client.get("/me", headers={"Authorization": token})
    assert (revoked.status_code, "withdrew" in revoked.json()["detail"]) == (403, True)
    wrong = client.get("/me", headers={"Authorization": "Bearer " + bearer_token("lamp", "wrong")})
    assert (wrong.status_code, wrong.text) == (401, client.get("/me").text)


def test_a_role_is_required(client: Client, database: Database) -> None:
    """A client's role does not open an administrator's route."""
    refused = client.get("/admin", headers={"Authorization": generated(database, "lamp")})
    assert (refused.status_code, refused.json()["error"]) == (403, "AccessDeniedError")
    admin = generated(database, "boss", role=Role.ADMIN)
    assert client.get("/admin", headers={"Authorization": admin}).json() == "boss"


def test_invalid_arguments() -> None:
    """A value with a wrong type, a lone surrogate and an unknown role are refused at once."""
    wrong: Any = 5
    for call in (
        lambda: bearer_token(wrong, "x"), lambda: bearer_token("x", wrong), lambda: require_role(wrong), require_role,
        lambda: bearer_token("\ud800", "x"), lambda: bearer_token("x", "\ud800"),
    ):  # fmt: skip
        with pytest.raises(errors.InvalidArgumentError) as refused:
            call()
        assert not isinstance(refused.value.__context__, UnicodeError)  # its attribute `object` is the text


def test_too_many_attempts(client: Client) -> None:
    """After too many failed checks the reply has the status 429 and the time to wait."""
    headers = {"Authorization": basic("klaus:é", "a wrong secret")}
    replies = [client.get("/me", headers=headers) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [401, 401, 429]
    assert int(replies[2].headers["retry-after"]) > 0


def test_status_without_handlers(database: Database) -> None:
    """An application that does not install the error handlers refuses with the same status."""
    app = make_app()
    app.exception_handlers.clear()
    refused = Client(app, database).get("/me")
    assert (refused.status_code, refused.headers["www-authenticate"][:6]) == (401, "Bearer")


def test_documented_schemes(client: Client) -> None:
    """The OpenAPI document names both schemes as alternatives."""
    document = client.get("/openapi.json").json()
    assert document["paths"]["/me"]["get"]["security"] == [{"device-bearer": []}, {"device-basic": []}]
    assert set(document["components"]["securitySchemes"]) == {"device-bearer", "device-basic"}


def test_the_check_does_not_block_the_event_loop(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow hash is computed in another thread than that of the event loop."""
    threads: list[threading.Thread] = []
    original = database.check_secret

    def check(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*arguments)

    monkeypatch.setattr(database, "check_secret", check)
    assert client.get("/me", headers={"Authorization": basic("klaus:é", PASSWORD)}).status_code == 200
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_lifespan_opens_sweeps_and_closes(tmp_path: Path) -> None:
    """The lifespan opens, sweeps, backs up and closes the database, and runs the application's own lifespan inside."""
    events: list[str] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        app.state.homeagent_database.ping()
        events.append("begin")
        yield {"name": "hub"}
        app.state.homeagent_database.ping()
        events.append("end")

    backups = BackupSchedule(tmp_path / "backups")
    app = FastAPI(lifespan=lifespan(tmp_path / "hub.db", then=own, backups=backups, pool_size=3))

    @app.get("/")
    def status(database: DatabaseDep) -> bool:
        return database._sweepers[0].running

    async def serve() -> Database:
        async with app.router.lifespan_context(app):
            pause = threading.Event()
            while not list((tmp_path / "backups").glob("*.json")):
                await asyncio.to_thread(pause.wait, 0.01)
            running = await asyncio.to_thread(lambda: Client(app).get("/").json())
            assert running is True
            database: Database = app.state.homeagent_database
            return database

    database = asyncio.run(serve())
    assert events == ["begin", "end"]
    with pytest.raises(errors.DatabaseClosedError):
        database.ping()
    with pytest.raises(errors.InvalidArgumentError, match="backups= needs sweep_every="):
        lifespan(tmp_path / "hub.db", sweep_every=None, backups=backups)


def test_a_failed_start_closes_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the opened database does not answer, the lifespan closes the database."""
    opened: list[Database] = []

    def fail(database: Database) -> None:
        opened.append(database)
        raise errors.DatabaseBusyError("the database is busy")

    monkeypatch.setattr(Database, "ping", fail)
    app = FastAPI(lifespan=lifespan(":memory:"))

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(errors.DatabaseBusyError):
        asyncio.run(serve())
    assert opened[0]._closed


def test_a_missing_lifespan_is_named(database: Database) -> None:
    """If an application runs without its lifespan, as a mounted one does, the error names each remedy."""
    outer, mounted = FastAPI(lifespan=lifespan(database)), FastAPI(lifespan=lifespan(database))
    mounted.include_router(health_router)
    outer.mount("/inner", mounted)
    client = Client(outer, database)
    with pytest.raises(errors.UnitStateError, match=r"pass FastAPI\(.* set state\.homeagent_database of the mounted"):
        client.get("/inner/health")
    mounted.dependency_overrides[get_database] = lambda: database
    assert client.get("/inner/health").json() == {"status": "ok"}
    mounted.dependency_overrides.clear()
    mounted.state.homeagent_database = database
    assert client.get("/inner/health").json() == {"status": "ok"}


def test_health(client: Client, database: Database) -> None:
    """The health route is open to all, and has the status 503 if the database does not answer."""
    assert client.get("/health").status_code == 200
    database.close()
    closed = client.get("/health")
    assert (closed.status_code, closed.json()["detail"]) == (503, "The database does not answer.")
