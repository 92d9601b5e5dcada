"""The gateway's side of the handshake."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from secrets import token_urlsafe
from typing import TYPE_CHECKING

import anyio

from homeagent.errors import AccessDeniedError, AuthenticationError, HandshakeError, InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.handshake import messages
from homeagent.handshake.messages import Receive, Send
from homeagent.models.device import Device, DeviceStatus
from homeagent.models.types import later
from homeagent.scram import proof_message, server_signature

if TYPE_CHECKING:
    from homeagent.database import Database
    from homeagent.unit_of_work import UnitOfWork

REFUSALS = {
    "pending": "The device waits for an administrator's approval: try again after the approval.",
    "revoked": "An administrator withdrew the approval of the device.",
}
"""Texts for a device with the right secret but without an approval. The keys are values of DeviceStatus."""

_DENIED = "the proof is wrong, the time differs too much, or the device does not exist"


@dataclass(frozen=True, slots=True)
class Admission:
    """Approved device after a successful handshake, with the verifier at that time."""

    device: Device
    verifier: str = field(repr=False)


@clears_locals
async def authenticate_device(
    database: Database,
    *,
    send: Send,
    receive: Receive,
    time_limit: timedelta = timedelta(seconds=10),
    skew: timedelta = timedelta(minutes=5),
) -> Admission:
    """Run the gateway's side of a handshake. If the gateway refuses the device, send a message with the reason.

    Args:
        database: the open database.
        send: function that sends a text frame.
        receive: function that returns the next frame. If the connection is closed, the function raises an error.
        time_limit: longest duration of the whole handshake.
        skew: allowed difference between the device's clock and the gateway's clock.

    Raises:
        AuthenticationError: if the proof or the time is wrong, or the device is absent.
        AccessDeniedError: if the proof is right, but the device is pending or revoked.
        HandshakeError: if a message is invalid, or if the handshake takes too long.
        InvalidArgumentError: if `time_limit` or `skew` is invalid, or if the skew reaches past the year 9999.
        HomeAgentError: if the function can't read the database.
    """
    messages.check_durations(time_limit, skew)
    try:
        with anyio.fail_after(time_limit.total_seconds()):
            return await _authenticate(database, send, receive, skew)
    except TimeoutError as error:
        raise HandshakeError(f"the handshake took longer than {time_limit.total_seconds():g} s") from error
    except (AuthenticationError, AccessDeniedError, HandshakeError) as error:
        await send(messages.write(type="refused", error=type(error).__name__, detail=str(error)))
        raise


async def _authenticate(database: Database, send: Send, receive: Receive, skew: timedelta) -> Admission:
    hello = messages.read(await receive(), "hello")
    device_id = messages.field(hello, "device_id", str)
    challenge = token_urlsafe(24)
    parameters = await database.aproof_parameters(device_id)
    await send(
        messages.write(
            type="challenge",
            challenge=challenge,
            salt=parameters.salt,
            iterations=parameters.iterations,
            time=await database.arun(lambda unit: unit.now(), read_only=True),
        )
    )
    answer = messages.read(await receive(), "proof")
    nonce = f"{challenge}.{messages.field(answer, 'nonce', str)}"
    signed_at, proof = messages.time_of(answer), messages.bytes_of(answer, "proof")
    try:
        checked = await database.acheck_proof(device_id, nonce=nonce, timestamp=signed_at, proof=proof)
    except InvalidArgumentError:
        raise HandshakeError("the nonce of the device is invalid") from None
    if checked.device is None:
        raise AuthenticationError(_DENIED)

    def admit(unit: UnitOfWork) -> Device | None:
        if signed_at - unit.now() > skew:
            return None
        fresh = unit.nonces.consume(device_id, nonce, expires_at=later(signed_at, skew, "skew"))
        return unit.devices.find_by_id(device_id) if fresh else None

    device, verifier = await database.arun(admit), checked.device.proof_verifier
    if device is None or verifier is None or device.proof_verifier != verifier:
        raise AuthenticationError(_DENIED)
    _require_approval(device)
    message = proof_message(device_id=device_id, nonce=nonce, timestamp=signed_at)
    await send(messages.write(type="welcome", signature=server_signature(verifier, message)))
    return Admission(device, verifier)


async def recheck(database: Database, admission: Admission) -> None:
    """Raise an error if an admitted device no longer has access. Call this function after each change of the device.

    Raises:
        AuthenticationError: if the device was deleted, or its secret or its role was replaced.
        AccessDeniedError: if the device is no longer approved.
    """
    admitted = admission.device
    device = await database.arun(lambda unit: unit.devices.find_by_id(admitted.id), read_only=True)
    if device is None or device.proof_verifier != admission.verifier or device.role is not admitted.role:
        raise AuthenticationError("the device was deleted, or its secret or its role was replaced")
    _require_approval(device)


def _require_approval(device: Device) -> None:
    """Raise AccessDeniedError if the device is pending or revoked. The caller must check the device's proof before."""
    if device.status is not DeviceStatus.APPROVED:
        raise AccessDeniedError(REFUSALS[device.status.value])
