"""Accept WebSockets of devices. Close the WebSocket of a device that loses its access."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
from anyio.to_thread import run_sync
from fastapi import WebSocket, WebSocketDisconnect, WebSocketException
from starlette.websockets import WebSocketState

from homeagent.database import Database
from homeagent.errors import (
    AccessDeniedError,
    AuthenticationError,
    ConnectionLostError,
    DatabaseBusyError,
    DatabaseClosedError,
    HandshakeError,
    HomeAgentError,
    LimitError,
    TooManyAttemptsError,
)
from homeagent.handshake import REFUSALS, Admission, authenticate_device, recheck
from homeagent.handshake.messages import check_durations
from homeagent.models.device import Device
from homeagent.models.device_change import DeviceChangeKind

logger: logging.Logger = logging.getLogger("homeagent")


@asynccontextmanager
async def accept_device(
    websocket: WebSocket,
    database: Database,
    *,
    time_limit: timedelta = timedelta(seconds=10),
    skew: timedelta = timedelta(minutes=5),
) -> AsyncIterator[Device]:
    """Accept a WebSocket, run the handshake, and yield the approved device.

    When the access ends, homeagent cancels the block, and closes the WebSocket. A revocation, a deletion, a new secret,
    a new role or an unreadable feed of device changes ends the access. The page on FastAPI lists the close codes.

    Args:
        websocket: WebSocket that the application has not accepted yet.
        database: the open database.
        time_limit: longest duration of the handshake.
        skew: allowed difference between the device's clock and the gateway's clock.

    Raises:
        WebSocketException: if the handshake fails, or if the device lacks or loses access. Starlette then closes the
            WebSocket. If the application has already closed the WebSocket, a loss of access only cancels the block.
        WebSocketDisconnect: if the device closed the WebSocket during the handshake.
        InvalidArgumentError: if `time_limit` or `skew` is invalid.
    """
    check_durations(time_limit, skew)
    # Subscribe before the handshake, because a later subscription could miss a revocation.
    changes = await run_sync(database.watch_devices)
    await websocket.accept()

    async def receive() -> object:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
        return message.get("text")

    try:
        admission = await authenticate_device(
            database, send=websocket.send_text, receive=receive, time_limit=time_limit, skew=skew
        )
    except HomeAgentError as error:
        raise _closing(error) from error
    ended: list[HomeAgentError] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            ended.append(await _end_of_access(database, admission, changes))
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            yield admission.device
        except Exception as error:  # noqa: BLE001  raised again below, because the task group would wrap the error
            failure = error
        group.cancel_scope.cancel()
    # A WebSocket that the application has closed can't be closed again.
    if ended and websocket.application_state is not WebSocketState.DISCONNECTED:
        raise _closing(ended[0]) from ended[0]
    if failure is not None:
        raise failure


async def _end_of_access(database: Database, admission: Admission, changes: AsyncIterator[Any]) -> HomeAgentError:
    """Wait until the device loses its access or the feed fails. Return the reason."""
    try:
        async for change in changes:
            # A change without a device id has the kind `reset`.
            if change.device_id not in {admission.device.id, None}:
                continue
            # Do not read the device after a revocation. Otherwise the device would stay connected while all worker
            # threads are busy (`test_a_revocation_while_the_workers_are_busy`).
            if change.kind is DeviceChangeKind.REVOKED:
                return AccessDeniedError(REFUSALS["revoked"])
            if change.kind is DeviceChangeKind.DELETED:
                return AuthenticationError("the device was deleted")
            await recheck(database, admission)
    except HomeAgentError as error:
        return error
    return DatabaseClosedError("the changes of the devices have ended")


def _closing(error: HomeAgentError) -> WebSocketException:
    """Return the exception that makes Starlette close the WebSocket."""
    if isinstance(error, HandshakeError):
        return WebSocketException(4408 if isinstance(error.__cause__, TimeoutError) else 4400, str(error))
    if isinstance(error, AuthenticationError):
        return WebSocketException(4401, str(error))
    if isinstance(error, AccessDeniedError):
        return WebSocketException(4403, str(error))
    if isinstance(error, (DatabaseBusyError, ConnectionLostError, LimitError, TooManyAttemptsError)):
        return WebSocketException(1013, "try again later")
    logger.error(
        "a WebSocket was closed: %s",
        type(error).__name__,
        exc_info=error,
        extra={"event": "websocket_closed", "error": type(error).__name__},
    )
    return WebSocketException(1011, "the server could not check the device")
