"""The handshake: both sides prove that they know the device's secret, and no other caller gets in."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, cast

import anyio
import pytest
from fastapi import WebSocket
from pydantic import SecretStr

from homeagent import Database, Device, Role
from homeagent.errors import AccessDeniedError, AuthenticationError, HandshakeError, InvalidArgumentError
from homeagent.fastapi import accept_device
from homeagent.handshake import MAX_MESSAGE, Admission, authenticate_device, gateway, recheck
from homeagent.handshake.client import authenticate
from homeagent.testing import FakeClock
from tests.conftest import pair
from tests.credentials.conftest import cheap_hashes as cheap_hashes

pytestmark = pytest.mark.usefixtures("cheap_hashes")


Side = Callable[[Callable[[Any], Awaitable[None]], Callable[[], Awaitable[Any]]], Awaitable[Any]]


Result = tuple[list[Any], list[list[Any]]]
"""The result or the error of each side, and the messages of each side."""


def connect(one: Side, other: Side, backend: str = "asyncio") -> Result:
    """Run both sides of a connection."""
    results: list[Any] = [None, None]
    sent: list[list[Any]] = [[], []]

    async def both() -> None:
        pipes = [anyio.create_memory_object_stream[Any](10) for _ in range(2)]

        async def run(number: int, side: Side) -> None:
            async def send(message: Any) -> None:
                sent[number].append(message)
                await pipes[number][0].send(message)

            try:
                results[number] = await side(send, pipes[1 - number][1].receive)
            except Exception as error:  # noqa: BLE001  the test looks at each error
                results[number] = error
            finally:
                pipes[number][0].close()  # the other side does not wait for a side that has ended

        async with anyio.create_task_group() as group:
            group.start_soon(run, 0, one)
            group.start_soon(run, 1, other)
        for _, receiver in pipes:
            receiver.close()

    anyio.run(both, backend=backend)
    return results, sent


@pytest.fixture
def handshake(homeagent_database: Database, homeagent_clock: FakeClock) -> Callable[..., Result]:
    """A function that runs a handshake of a device with a gateway, with the test's clock on both sides."""

    def run(device_id: str, secret: SecretStr | str, backend: str = "asyncio", **options: Any) -> Result:
        def device(send: Any, receive: Any) -> Awaitable[None]:
            return authenticate(device_id, secret, send=send, receive=receive, **{"clock": homeagent_clock, **options})

        return connect(device, partial(serve, homeagent_database), backend)

    return run


async def serve(database: Database, send: Any, receive: Any, **options: Any) -> Admission:
    """Run the gateway's side."""
    return await authenticate_device(database, send=send, receive=receive, **options)


async def say(messages: list[Any], send: Any, receive: Any) -> Any:
    """Send messages as a device, and return the last answer."""
    for message in messages:
        await send(message)
        answer = json.loads(await receive())
    return answer


async def say_nothing(send: Any, receive: Any) -> None:
    """End without a message."""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_approved_device_gets_in(handshake: Any, homeagent_database: Database, backend: str) -> None:
    """The gateway gets the device, and the messages contain neither the secret nor the verifier."""
    secret = pair(homeagent_database)
    (device, gateway), sent = handshake("phone", secret, backend)
    assert device is None
    assert gateway.device.id == "phone"
    kinds = [[json.loads(message)["type"] for message in messages] for messages in sent]
    assert kinds == [["hello", "proof"], ["challenge", "welcome"]]
    assert secret.get_secret_value() not in str(sent)
    assert "SCRAM" not in f"{sent} {gateway!r}"


def test_who_stays_out(handshake: Any, homeagent_database: Database) -> None:
    """Wrong secrets and unknown ids get the same reply. Pending and revoked devices learn why they stay out."""
    secret = pair(homeagent_database)
    waiting = pair(homeagent_database, "waiting", approve=False)
    pair(homeagent_database, "anna", SecretStr("a chosen secret"))
    wrong = [("phone", "ha1_" + "A" * 43), ("nobody", secret), ("a\nb", secret), ("anna", "a chosen secret")]
    refusals = []
    for device_id, presented in wrong:
        (device, gateway), sent = handshake(device_id, presented)
        assert type(device) is type(gateway) is AuthenticationError
        refusals.append(sent[1][-1])
    assert len(set(refusals)) == 1

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
        device = handshake("phone", secret, clock=clock, time_limit=timedelta(seconds=1))[0][0]
        assert isinstance(device, HandshakeError)
        assert "set the clock of the device" in str(device)
        (device, gateway), sent = handshake("phone", secret, clock=clock, skew=timedelta(hours=1))
        assert type(device) is type(gateway) is AuthenticationError
        assert len(sent[0]) == 2


@pytest.mark.parametrize("option", [{"time_limit": 5}, {"time_limit": timedelta(0)}, {"skew": 5}])
def test_invalid_durations(homeagent_database: Database, option: dict[str, Any]) -> None:
    """A wrong time limit or skew raises InvalidArgumentError on each side, and no side sends a message."""
    websocket = WebSocket({"type": "websocket"}, *[cast("Any", None)] * 2)

    async def device(send: Any, receive: Any) -> None:
        await authenticate("phone", "x", send=send, receive=receive, **option)

    async def accept(send: Any, receive: Any) -> None:
        async with accept_device(websocket, homeagent_database, **option):
            pass

    for side in device, partial(serve, homeagent_database, **option), accept:
        (error, _), sent = connect(side, say_nothing)
        assert (type(error), next(iter(option)) in str(error)) == (InvalidArgumentError, True)
        assert sent == [[], []]


def test_an_endless_skew(homeagent_database: Database, homeagent_clock: FakeClock) -> None:
    """A skew that ends after the year 9999 is named in the error."""
    secret = pair(homeagent_database)

    async def device(send: Any, receive: Any) -> None:
        await authenticate("phone", secret, send=send, receive=receive, clock=homeagent_clock)

    (_, error), _ = connect(device, partial(serve, homeagent_database, skew=timedelta.max))
    assert (type(error), str(error)) == (InvalidArgumentError, "skew reaches past the year 9999")


def test_a_replayed_proof(homeagent_database: Database, handshake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded proof fails on another connection, and also if the challenge were the same."""
    secret = pair(homeagent_database)
    for is_same in (False, True):
        if is_same:
            monkeypatch.setattr(gateway, "token_urlsafe", lambda size: "the-same-challenge")
        recorded = handshake("phone", secret)[1][0]
        (answer, gateway_side), _ = connect(partial(say, recorded), partial(serve, homeagent_database))
        assert (answer["error"], type(gateway_side)) == ("AuthenticationError", AuthenticationError)


def test_a_false_gateway(homeagent_database: Database, homeagent_clock: FakeClock) -> None:
    """The device notices a gateway without the verifier, with few iterations or with a bad challenge."""
    secret = pair(homeagent_database)

    async def false(send: Any, receive: Any, iterations: int = 4096, text: str = "c") -> None:
        await receive()
        challenge = {"type": "challenge", "challenge": text, "salt": "c2FsdHNhbHRzYWx0c2FsdA=="}
        milliseconds = int(homeagent_clock().timestamp() * 1000)
        await send(json.dumps({**challenge, "iterations": iterations, "time": milliseconds}))
        if iterations >= 4096 and text == "c":
            await receive()
            await send(json.dumps({"type": "welcome", "signature": "A" * 43 + "="}))

    invalid = [partial(false, iterations=1), *(partial(false, text=text) for text in ("\ud800", "", "c" * 1025))]
    for side, words in ((false, "does not have the verifier"), *((each, "invalid parameters") for each in invalid)):
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

    (answer, gateway_side), _ = connect(partial(say, sent), partial(serve, homeagent_database))
    assert isinstance(gateway_side, HandshakeError)
    assert (answer["type"], answer["error"], answer["detail"]) == ("refused", "HandshakeError", str(gateway_side))


def test_the_time_limit(homeagent_database: Database) -> None:
    """If the other side is silent, both sides give up after the time limit."""

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


def test_an_id_of_a_wrong_type(handshake: Any) -> None:
    """If the device's id is not a str, the device sends nothing."""
    (device, _), sent = handshake(SecretStr("phone"), "x" * 8)
    assert isinstance(device, InvalidArgumentError)
    assert str(device) == "device_id must be text, not SecretStr"
    assert sent[0] == []


def test_recheck(handshake: Any, homeagent_database: Database) -> None:
    """After a deletion, or a change of the secret, the role or the approval, an admitted device has no access."""
    admission = handshake("phone", pair(homeagent_database))[0][1]
    anyio.run(recheck, homeagent_database, admission)
    secret = homeagent_database.rotate_secret("phone", overlap=timedelta(minutes=1))
    with pytest.raises(AuthenticationError):
        anyio.run(recheck, homeagent_database, admission)
    admission = handshake("phone", secret)[0][1]
    with homeagent_database.unit_of_work() as unit:
        unit.session.get_one(Device, "phone").role = Role.NODE
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
