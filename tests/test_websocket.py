"""`accept_device` on a real server: a device gets in after the handshake, and out when it loses its access."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from pydantic import SecretStr

from homeagent import Database
from homeagent.errors import AccessDeniedError, AuthenticationError
from homeagent.fastapi import DatabaseDep, accept_device, install_error_handlers, lifespan
from homeagent.handshake.client import authenticate
from homeagent.testing import DatabaseFactory
from tests.conftest import ROOT, pair

websockets = pytest.importorskip("websockets")

Use = Callable[[Any], Coroutine[Any, Any, Any]]
Act = Callable[[], object]


class Gateway:
    """A server with one route, which echoes the messages of each device.

    Attributes:
        ended: how the block of each connection ended.
    """

    def __init__(self, database: Database) -> None:
        self.ended: list[str] = []
        app = self.app = FastAPI(lifespan=lifespan(database, sweep_every=None))
        install_error_handlers(app)

        @app.websocket("/ws")
        async def serve(websocket: WebSocket, database: DatabaseDep) -> None:
            async with accept_device(websocket, database, time_limit=timedelta(seconds=2)) as device:
                try:
                    while True:
                        message = await websocket.receive_text()
                        if message == "crash":
                            raise RuntimeError("private")
                        if message == "close":
                            await websocket.close(4000)
                            await asyncio.Event().wait()
                        await websocket.send_text(f"{device.id}: {message}")
                except BaseException as error:
                    self.ended.append(type(error).__name__)
                    raise
            self.ended.append("after the block")

        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="websockets-sansio", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()

    def connect(self, use: Use) -> Any:
        async def run() -> Any:
            from websockets.asyncio.client import connect

            async with connect(f"ws://127.0.0.1:{self.port}/ws", proxy=None) as connection:
                return await asyncio.wait_for(use(connection), 20)

        return asyncio.run(run())

    def enter(self, device_id: str, secret: SecretStr | str, use: Use) -> Any:
        """Open a WebSocket, make the handshake as a device, and return the result of `use`."""

        async def run(connection: Any) -> Any:
            await authenticate(device_id, secret, send=connection.send, receive=connection.recv)
            return await use(connection)

        return self.connect(run)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()


@pytest.fixture
def database(homeagent_factory: DatabaseFactory) -> Database:
    """A store with the real clock, as server and device are real."""
    from homeagent.clock import system_clock

    return homeagent_factory(clock=system_clock)


@pytest.fixture
def gateway(database: Database) -> Iterator[Gateway]:
    gateway = Gateway(database)
    yield gateway
    gateway.close()


async def code_of(connection: Any) -> int:
    """Wait until the server closes the connection, and return the code."""
    await connection.wait_closed()
    return int(connection.close_code)


def test_an_approved_device_talks(gateway: Gateway, database: Database) -> None:
    """After the handshake the device talks to the application. A change of another device has no effect."""

    async def talk(connection: Any) -> str:
        await asyncio.to_thread(database.devices.revoke, "lamp")
        await asyncio.to_thread(database.devices.update_last_seen, "phone")
        await connection.send("hello")
        return str(await connection.recv())

    pair(database, "lamp")
    assert gateway.enter("phone", pair(database), talk) == "phone: hello"


def test_who_stays_out(gateway: Gateway, database: Database) -> None:
    """The close code and the message say whether the proof was wrong or the device has no approval."""
    secret = pair(database)
    pending = pair(database, "waiting", approve=False)

    async def refused(device_id: str, presented: SecretStr, kind: type[Exception], connection: Any) -> int:
        with pytest.raises(kind):
            await authenticate(device_id, presented, send=connection.send, receive=connection.recv)
        return await code_of(connection)

    assert gateway.connect(partial(refused, "phone", pending, AuthenticationError)) == 4401
    assert gateway.connect(partial(refused, "nobody", secret, AuthenticationError)) == 4401
    assert gateway.connect(partial(refused, "waiting", pending, AccessDeniedError)) == 4403
    assert gateway.ended == []


@pytest.mark.parametrize("message", ["no JSON", b"\0", "x" * 10_000, None])
def test_invalid_and_late_messages(gateway: Gateway, message: str | bytes | None) -> None:
    """An invalid or large message, and silence, end the handshake."""

    async def misbehave(connection: Any) -> int:
        if message is not None:
            await connection.send(message)
        return await code_of(connection)

    assert gateway.connect(misbehave) == (4408 if message is None else 4400)


async def lose(change: Act, connection: Any) -> int:
    """Change the device, when the application serves the device. Return the code with which the server closes."""
    await connection.send("hello")
    await connection.recv()
    await asyncio.to_thread(change)
    return await code_of(connection)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda database: database.devices.revoke("phone"), 4403),
        (lambda database: database.devices.delete("phone"), 4401),
        (lambda database: database.rotate_secret("phone", overlap=timedelta(hours=1)), 4401),
        (lambda database: database.close(), 1011),
    ],
    ids=["revoked", "deleted", "rotated", "unreadable"],
)
def test_a_device_loses_its_access(gateway: Gateway, database: Database, change: Any, code: int) -> None:
    """If the device loses its access, or the changes can't be read, the block is cancelled and the socket closed."""
    assert gateway.enter("phone", pair(database), partial(lose, partial(change, database))) == code
    assert gateway.ended == ["CancelledError"]


def test_a_revocation_during_the_handshake(
    gateway: Gateway, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the device is revoked right after the approval was read, the device is cut off."""
    from homeagent.fastapi import websocket

    original = websocket.authenticate_device

    async def and_revoke(*arguments: Any, **named: Any) -> Any:
        admission = await original(*arguments, **named)
        await asyncio.to_thread(database.devices.revoke, "phone")
        return admission

    monkeypatch.setattr(websocket, "authenticate_device", and_revoke)
    assert gateway.enter("phone", pair(database), code_of) == 4403


@pytest.mark.parametrize(("method", "code"), [("revoke", 4403), ("delete", 4401)])
def test_a_revocation_while_the_workers_are_busy(
    gateway: Gateway, database: Database, monkeypatch: pytest.MonkeyPatch, method: str, code: int
) -> None:
    """A revoked or deleted device is cut off, even if the device can't be read at that time."""

    async def never(*arguments: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("homeagent.fastapi.websocket.recheck", never)
    change = partial(getattr(database.devices, method), "phone")
    assert gateway.enter("phone", pair(database), partial(lose, change)) == code


def test_how_a_block_ends_otherwise(gateway: Gateway, database: Database) -> None:
    """If the device leaves, or the application fails, the block gets the error unchanged."""
    secret = pair(database)

    async def crash(connection: Any) -> int:
        await connection.send("crash")
        return await code_of(connection)

    async def leave(connection: Any) -> None: ...

    assert gateway.enter("phone", secret, crash) in {1006, 1011}
    gateway.enter("phone", secret, leave)
    gateway.close()
    assert sorted(gateway.ended) == ["RuntimeError", "WebSocketDisconnect"]


def test_a_loss_of_access_after_the_close(gateway: Gateway, database: Database) -> None:
    """If the application has closed the WebSocket, a revocation cancels the block without a second close."""

    async def close(connection: Any) -> int:
        await connection.send("close")
        return await code_of(connection)

    assert gateway.enter("phone", pair(database), close) == 4000
    database.devices.revoke("phone")
    gateway.close()
    assert gateway.ended == ["CancelledError", "after the block"]


def test_the_page(gateway: Gateway, database: Database) -> None:
    """The route and the device of docs/fastapi.md talk to each other."""
    page = (ROOT / "docs" / "fastapi.md").read_text(encoding="utf-8").partition("## Accept WebSockets")[2]
    names: dict[str, Any] = {"app": FastAPI(), "DatabaseDep": DatabaseDep}
    for block in re.findall("^```py\n(.*?)^```$", page.partition("## Error")[0], re.M | re.S):
        exec(block, names)  # noqa: S102  the page's own code
    gateway.app.mount("/page", names["app"])
    names["app"].state.homeagent_database = database
    answer = names["ask"](f"ws://127.0.0.1:{gateway.port}/page/ws", "phone", pair(database), "hello")
    assert asyncio.run(answer) == "phone: hello"
