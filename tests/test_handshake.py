"""The handshake: both sides prove that they know the device's secret, and no other caller gets in."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import pytest
from pydantic import SecretStr

from homeagent import Database, Device, DevicePair, Role
from homeagent.errors import AccessDeniedError, AuthenticationError, HandshakeError
from homeagent.handshake import MAX_MESSAGE, Admission, authenticate_device, gateway, recheck
from homeagent.handshake.client import authenticate
from homeagent.testing import FakeClock
from tests.conftest import pair
from tests.credentials.conftest import cheap_hashes as cheap_hashes

pytestmark = pytest.mark.usefixtures("cheap_hashes")


class Pipe:
    """One direction of a connection, which keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self._send, self._receive = anyio.create_memory_object_stream[Any](10)

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await self._send.send(message)

    async def receive(self) -> Any:
        return await self._receive.receive()


Side = Callable[[Callable[[Any], Awaitable[None]], Callable[[], Awaitable[Any]]], Awaitable[Any]]


def connect(one: Side, other: Side, backend: str = "asyncio") -> tuple[list[Any], list[list[Any]]]:
    """Run both sides of a connection. Return each side's result or error, and the messages of each side."""
    results: list[Any] = [None, None]
    pipes: list[Pipe] = []

    async def run(number: int, side: Side, pipes: list[Pipe]) -> None:
        try:
            results[number] = await side(pipes[number].send, pipes[1 - number].receive)
        except Exception as error:  # noqa: BLE001  the test looks at each error
            results[number] = error
        finally:
            pipes[number]._send.close()  # the other side does not wait for a side that has ended

    async def both() -> None:
        pipes.extend([Pipe(), Pipe()])
        async with anyio.create_task_group() as group:
            group.start_soon(run, 0, one, pipes)
            group.start_soon(run, 1, other, pipes)
        for pipe in pipes:
            pipe._send.close()
            pipe._receive.close()

    anyio.run(both, backend=backend)
    return results, [pipe.sent for pipe in pipes]


@pytest.fixture
def handshake(homeagent_database: Database, homeagent_clock: FakeClock) -> Callable[..., tuple[list[Any], list[Any]]]:
    """A function that runs a handshake of a device with a gateway, with the test's clock on both sides."""

    def run(
        device_id: str, secret: SecretStr | str, backend: str = "asyncio", **options: Any
    ) -> tuple[list[Any], list[Any]]:
        def device(send: Any, receive: Any) -> Awaitable[None]:
            return authenticate(device_id, secret, send=send, receive=receive, **{"clock": homeagent_clock, **options})

        return connect(device, partial(serve, homeagent_database), backend)

    return run


async def serve(database: Database, send: Any, receive: Any, **options: Any) -> Admission:
    """Run the gateway's side."""
    return await authenticate_device(database, send=send, receive=receive, **options)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_approved_device_gets_in(handshake: Any, homeagent_database: Database, backend: str) -> None:
    """The gateway gets the device, and the messages contain neither the secret nor the verifier."""
    secret = pair(homeagent_database)
    (device, gateway), sent = handshake("phone", secret, backend)
    assert device is None
    assert gateway.device.id == "phone"
    assert [json.loads(message)["type"] for pipe in sent for message in pipe] == [
        "hello",
        "proof",
        "challenge",
        "welcome",
    ]
    assert secret.get_secret_value() not in str(sent)
    assert "SCRAM" not in str(sent)
    assert "SCRAM" not in repr(gateway)


def test_who_stays_out(handshake: Any, homeagent_database: Database) -> None:
    """Wrong secrets and unknown ids get the same reply. Pending and revoked devices learn why they stay out."""
    secret = pair(homeagent_database)
    pair(homeagent_database, "waiting", approve=False)
    homeagent_database.pair(DevicePair(id="anna", role=Role.ADMIN, shared_secret=SecretStr("a chosen secret")))
    homeagent_database.devices.approve("anna")
    wrong = [("phone", "ha1_" + "A" * 43), ("nobody", secret), ("a\nb", secret), ("anna", "a chosen secret")]
    refusals = []
    for device_id, presented in wrong:
        (device, gateway), sent = handshake(device_id, presented)
        assert type(device) is type(gateway) is AuthenticationError
        refusals.append(sent[1][-1])
    assert len(set(refusals)) == 1

    waiting = homeagent_database.rotate_secret("waiting")
    (device, gateway), sent = handshake("waiting", waiting)
    assert type(device) is type(gateway) is AccessDeniedError
    assert "waits for an administrator's approval" in str(device)
    homeagent_database.devices.revoke("phone")
    (device, _), sent = handshake("phone", secret)
    assert (type(device), "withdrew" in str(device)) == (AccessDeniedError, True)
    assert "signature" not in str(sent)


def test_the_time_is_checked(handshake: Any, homeagent_database: Database, homeagent_clock: FakeClock) -> None:
    """The device refuses to prove by a wrong clock, and the gateway refuses an old or a future time."""
    secret = pair(homeagent_database)
    for minutes in (-6, 6):
        clock = FakeClock(homeagent_clock() + timedelta(minutes=minutes))
        device, sent = handshake("phone", secret, clock=clock, time_limit=timedelta(seconds=1))[0][0], None
        assert isinstance(device, HandshakeError)
        assert "set the clock of the device" in str(device)
        (device, gateway), sent = handshake("phone", secret, clock=clock, skew=timedelta(hours=1))
        assert type(device) is type(gateway) is AuthenticationError
        assert len(sent[0]) == 2


def test_a_replayed_proof(homeagent_database: Database, handshake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded proof fails on another connection, and also if the challenge were the same."""
    secret = pair(homeagent_database)
    recorded = handshake("phone", secret)[1][0]

    async def replay(send: Any, receive: Any) -> Any:
        for message in recorded:
            await send(message)
            answer = await receive()
        return json.loads(answer)

    (answer, gateway_side), _ = connect(replay, partial(serve, homeagent_database))
    assert (answer["error"], type(gateway_side)) == ("AuthenticationError", AuthenticationError)

    monkeypatch.setattr(gateway, "token_urlsafe", lambda size: "the-same-challenge")
    recorded = handshake("phone", secret)[1][0]
    (answer, gateway_side), _ = connect(replay, partial(serve, homeagent_database))
    assert (answer["error"], type(gateway_side)) == ("AuthenticationError", AuthenticationError)


def test_a_false_gateway(homeagent_database: Database, homeagent_clock: FakeClock) -> None:
    """If the gateway does not know the verifier, or asks for few iterations, the device notices."""
    secret = pair(homeagent_database)

    async def false(send: Any, receive: Any, iterations: int = 4096) -> None:
        await receive()
        milliseconds = int(homeagent_clock().timestamp() * 1000)
        salt = "c2FsdHNhbHRzYWx0c2FsdA=="
        challenge = {
            "type": "challenge",
            "challenge": "c",
            "salt": salt,
            "iterations": iterations,
            "time": milliseconds,
        }
        await send(json.dumps(challenge))
        if iterations >= 4096:
            await receive()
            await send(json.dumps({"type": "welcome", "signature": "A" * 43 + "="}))

    for side, words in ((false, "does not have the verifier"), (partial(false, iterations=1), "invalid parameters")):
        device = connect(
            lambda send, receive: authenticate("phone", secret, send=send, receive=receive, clock=homeagent_clock), side
        )[0][0]
        assert isinstance(device, HandshakeError)
        assert words in str(device)


HELLO = '{"type": "hello", "device_id": "phone"}'


@pytest.mark.parametrize(
    "sent",
    [
        ["no JSON"],
        ["[]"],
        ["[" * 5000],
        [b"{}"],
        [None],
        ['{"type": "proof"}'],
        ['{"type": "hello"}'],
        ['{"type": "hello", "device_id": 7}'],
        [HELLO + " " * MAX_MESSAGE],
        [HELLO, '{"type": "proof", "nonce": "n", "time": 1, "proof": "%"}'],
        [HELLO, '{"type": "proof", "nonce": "n", "time": true, "proof": ""}'],
        [HELLO, '{"type": "proof", "nonce": "n", "time": 1e400, "proof": ""}'],
        [HELLO, '{"type": "proof", "nonce": "n", "time": 99999999999999999, "proof": ""}'],
        [HELLO, '{"type": "proof", "nonce": "\\n", "time": 1, "proof": ""}'],
        [HELLO, '{"type": "proof", "nonce": "\\ud800", "time": 1, "proof": ""}'],
    ],
)
def test_invalid_messages(homeagent_database: Database, sent: list[Any]) -> None:
    """An invalid message ends the handshake with an error that the other side also gets."""
    pair(homeagent_database)

    async def device(send: Any, receive: Any) -> Any:
        for message in sent:
            await send(message)
            answer = json.loads(await receive())
        return answer

    (answer, gateway_side), _ = connect(device, partial(serve, homeagent_database))
    assert isinstance(gateway_side, HandshakeError)
    assert (answer["type"], answer["error"], answer["detail"]) == ("refused", "HandshakeError", str(gateway_side))


def test_the_time_limit(homeagent_database: Database) -> None:
    """If the other side is silent, both sides give up after the time limit."""
    pair(homeagent_database)

    async def silent(send: Any, receive: Any) -> None:
        while True:
            await receive()

    short = timedelta(milliseconds=20)
    for side in (
        partial(serve, homeagent_database, time_limit=short),
        lambda send, receive: authenticate("phone", "x" * 8, send=send, receive=receive, time_limit=short),
    ):
        error = connect(side, silent)[0][0]
        assert isinstance(error, HandshakeError)
        assert isinstance(error.__cause__, TimeoutError)


def test_recheck(handshake: Any, homeagent_database: Database) -> None:
    """After a deletion, or a change of the secret, the role or the approval, an admitted device has no access."""
    admission = handshake("phone", pair(homeagent_database))[0][1]
    anyio.run(recheck, homeagent_database, admission)
    secret = homeagent_database.rotate_secret("phone", overlap=timedelta(minutes=1))
    with pytest.raises(AuthenticationError):
        anyio.run(recheck, homeagent_database, admission)
    admission = handshake("phone", secret)[0][1]
    with homeagent_database.unit_of_work() as unit:
        device = unit.session.get(Device, "phone")
        assert device is not None
        device.role = Role.NODE
    with pytest.raises(AuthenticationError):
        anyio.run(recheck, homeagent_database, admission)
    admission = handshake("phone", secret)[0][1]
    homeagent_database.devices.revoke("phone")
    with pytest.raises(AccessDeniedError):
        anyio.run(recheck, homeagent_database, admission)
    homeagent_database.devices.delete("phone")
    pair(homeagent_database)
    with pytest.raises(AuthenticationError):
        anyio.run(recheck, homeagent_database, admission)
