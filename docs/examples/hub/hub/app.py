"""Serve the hub by HTTP and WebSocket."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from os import PathLike
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, WebSocket, WebSocketException
from pydantic import BaseModel, Field, JsonValue, ValidationError

from homeagent import AgentCreate, Database, IdempotencyScope, Outcome
from homeagent.errors import HomeAgentError
from homeagent.fastapi import (
    CurrentDevice,
    accept_device,
    get_database,
    health_router,
    install_error_handlers,
    lifespan,
)
from hub.stores import HubUnit, MessageStore, PreferenceStore

AGENT = "butler"
METHOD = "message.send"

HubDatabase = Annotated[Database[HubUnit], Depends(get_database)]

router = APIRouter()


class SentMessage(BaseModel):
    """A message that a device sends over the WebSocket."""

    key: str = Field(min_length=1, max_length=100)
    """Key that the device chooses. A device that got no reply sends the message again with the same key."""
    text: str = Field(min_length=1, max_length=10_000)


class StoredMessage(BaseModel):
    """A message in a reply."""

    id: int
    text: str
    sent_at: datetime


class PreferenceValue(BaseModel):
    """The new value of a preference."""

    value: JsonValue


@router.get("/messages", response_model=list[StoredMessage])
def list_messages(
    device: CurrentDevice, database: HubDatabase, after: int = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Any:
    return database.store(MessageStore).of_sender(device.id, after=after, limit=limit)


@router.get("/preferences")
def list_preferences(device: CurrentDevice, database: HubDatabase) -> dict[str, JsonValue]:
    return database.store(PreferenceStore).of_device(device.id)


@router.put("/preferences/{name}", status_code=204)
def set_preference(name: str, body: PreferenceValue, device: CurrentDevice, database: HubDatabase) -> None:
    database.store(PreferenceStore).set(device.id, name, body.value)


@router.websocket("/ws")
async def receive_messages(websocket: WebSocket, database: HubDatabase) -> None:
    # The block ends when the device disconnects or loses its access.
    async with accept_device(websocket, database) as device:
        async for frame in websocket.iter_text():
            try:
                message = SentMessage.model_validate_json(frame)
            except ValidationError:
                raise WebSocketException(1007, "the message is invalid") from None
            reply: dict[str, JsonValue] = {"key": message.key}
            try:
                store = partial(store_once, device_id=device.id, message=message)
                # With the key, a second run of the unit does no harm after a commit with an unknown outcome.
                outcome = await database.arun(store, idempotent=True)
                reply["id"] = outcome.value
            except HomeAgentError as error:
                reply["error"] = type(error).__name__
            await websocket.send_json(reply)


def store_once(uow: HubUnit, device_id: str, message: SentMessage) -> Outcome:
    """In one commit, store a message, or return the id of the stored message if the key was used before."""

    def store(_: object) -> int | None:
        session = uow.sessions.resolve(agent_id=AGENT, sender_id=device_id)
        uow.sessions.touch(session.session_id)
        return uow.messages.add(session.session_id, message.text).id

    scope = IdempotencyScope(device_id=device_id, method=METHOD, key=message.key)
    return uow.run_once(scope, store, params=message.text)


def create_agent(uow: HubUnit) -> None:
    """Create the agent of the sessions, unless the agent exists."""
    if uow.agents.find_by_id(AGENT) is None:
        uow.agents.create(AgentCreate(id=AGENT, name="Butler", workspace_path="/srv/butler"))


@asynccontextmanager
async def prepare(app: FastAPI) -> AsyncGenerator[None, None]:
    """Run the hub's own steps after the database was opened."""
    database: Database[HubUnit] = app.state.homeagent_database
    await database.arun(create_agent)
    yield


def create_app(target: str | PathLike[str] | Database[HubUnit] | None = None) -> FastAPI:
    """Return the application, which opens the database of `target`, or uses an open database."""
    app = FastAPI(title="Hub", lifespan=lifespan(target, unit=HubUnit, migrations="hub:migrations", then=prepare))
    install_error_handlers(app)
    app.include_router(router)
    app.include_router(health_router)
    return app
