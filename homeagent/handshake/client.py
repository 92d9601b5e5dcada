"""The device's side of the handshake. The docstring of `homeagent.handshake` describes the messages.

Example with the library `websockets`:

```python
async with websockets.connect("wss://gateway.example/ws") as socket:
    await authenticate("phone", secret, send=socket.send, receive=socket.recv)
    await socket.send("…")
```
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from secrets import token_urlsafe
from typing import Any

import anyio
from anyio.to_thread import run_sync
from pydantic import SecretStr

from homeagent.callables import check_function
from homeagent.clock import Clock, system_clock
from homeagent.errors import AccessDeniedError, AuthenticationError, HandshakeError, InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.handshake import messages
from homeagent.handshake.messages import Receive, Send
from homeagent.models.types import check_label, check_searched
from homeagent.scram import ProofParameters, derive_proof_keys, proof_message

__all__ = ["authenticate"]

_REFUSALS = {"AuthenticationError": AuthenticationError, "AccessDeniedError": AccessDeniedError}


@clears_locals
async def authenticate(
    device_id: str,
    secret: SecretStr | str,
    *,
    send: Send,
    receive: Receive,
    time_limit: timedelta = timedelta(seconds=10),
    skew: timedelta = timedelta(minutes=5),
    clock: Clock = system_clock,
) -> None:
    """Prove that the device has its secret, and check the gateway's signature.

    Args:
        device_id: id of the device.
        secret: generated secret of the device. A secret that a person chose is not suitable for proofs.
        send: function that sends a text frame.
        receive: function that returns the next frame. If the connection is closed, the function raises an error.
        time_limit: longest duration of the whole handshake.
        skew: largest allowed difference between the clocks of the device and the gateway.
        clock: clock of the device.

    Raises:
        AuthenticationError: if the gateway does not accept the proof.
        AccessDeniedError: if the device is pending or revoked. The error message names the reason.
        HandshakeError: if the handshake takes too long, or the clocks differ too much. Another cause is an invalid
            message, or a gateway without the verifier. Close the connection after the error.
        InvalidArgumentError: if the device's id is not a str, or if `time_limit`, `skew` or `clock` is invalid.
    """
    check_searched(device_id, "device_id")
    messages.check_durations(time_limit, skew)
    check_function(clock, "clock")
    try:
        with anyio.fail_after(time_limit.total_seconds()):
            await _authenticate(device_id, secret, send, receive, skew, clock)
    except TimeoutError as error:
        raise HandshakeError(f"the handshake took longer than {time_limit.total_seconds():g} s") from error


async def _authenticate(
    device_id: str, secret: SecretStr | str, send: Send, receive: Receive, skew: timedelta, clock: Clock
) -> None:
    await send(messages.write(type="hello", device_id=device_id))
    challenge = _expect(await receive(), "challenge")
    difference = messages.time_of(challenge) - clock()
    if abs(difference) > skew:
        raise HandshakeError(f"the clocks of gateway and device differ by {difference}: set the clock of the device")
    given = messages.field(challenge, "challenge", str)
    try:
        check_label(given, "the challenge")
        parameters = ProofParameters(messages.bytes_of(challenge, "salt"), messages.field(challenge, "iterations", int))
    except InvalidArgumentError as error:
        raise HandshakeError(f"the gateway sent invalid parameters: {error}") from None
    keys = await run_sync(partial(derive_proof_keys, secret, parameters))
    own, now = token_urlsafe(24), clock()
    nonce = f"{given}.{own}"
    message = proof_message(device_id=device_id, nonce=nonce, timestamp=now)
    await send(messages.write(type="proof", nonce=own, time=now, proof=keys.prove(message)))
    welcome = _expect(await receive(), "welcome")
    if not keys.recognises(message, messages.bytes_of(welcome, "signature")):
        raise HandshakeError("the gateway does not have the verifier of this device: check the address of the gateway")


def _expect(message: object, kind: str) -> dict[str, Any]:
    """Return the fields of a message. If the gateway sent an error, raise the error."""
    fields = messages.read(message, kind, "refused")
    if fields["type"] == "refused":
        error, detail = messages.field(fields, "error", str), messages.field(fields, "detail", str)
        raise _REFUSALS.get(error, HandshakeError)(detail)
    return fields
