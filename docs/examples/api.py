"""Serve the store over HTTP. Requests and replies are homeagent's models, and each call of a store is a separate unit.

    uvicorn --factory --app-dir docs/examples api:create_app

Any client can pair a device. Approve the first administrator with `homeagent devices approve`. Administrators manage
devices and agents, and every approved device uses sessions, over HTTP or over a WebSocket.
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Response, WebSocket
from pydantic import BaseModel

from homeagent import (
    AgentCreate,
    AgentPublic,
    AgentSession,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentUpdate,
    Database,
    DevicePair,
    DevicePublic,
    DeviceStatus,
    DeviceUpdate,
    Role,
    Timestamp,
    UnitOfWork,
)
from homeagent.fastapi import (
    DatabaseDep,
    accept_device,
    current_device,
    health_router,
    install_error_handlers,
    lifespan,
    require_role,
)

for_all = APIRouter()
for_devices = APIRouter(dependencies=[Depends(current_device)])
for_admins = APIRouter(dependencies=[Depends(require_role(Role.ADMIN))])

# Starlette decodes `%2F` before it searches the route, so each route ends with the id as a `:path` parameter.

Limit = Annotated[int, Query(ge=1, le=1000)]


class PairReply(BaseModel):
    """Reply to a pairing request: a device that waits for approval, and its secret."""

    device: DevicePublic
    shared_secret: str | None
    """The generated secret, which only this reply shows; null if the device sent its own secret."""


class Changed(BaseModel):
    """Reply that says whether the call changed the row."""

    changed: bool


@for_all.post("/devices", status_code=201)
def pair(request: DevicePair, response: Response, database: DatabaseDep) -> PairReply:
    paired = database.pair(request)
    made = paired.shared_secret.get_secret_value() if request.shared_secret is None else None
    response.headers["Cache-Control"] = "no-store"
    return PairReply(device=DevicePublic.model_validate(paired.device), shared_secret=made)


@for_admins.get("/devices", response_model=list[DevicePublic])
def list_devices(
    database: DatabaseDep,
    role: Role | None = None,
    status: DeviceStatus | None = None,
    limit: Limit = 100,
    after: str | None = None,
) -> Any:
    return database.devices.list(role=role, status=status, limit=limit, after=after)


@for_admins.get("/devices/{device_id:path}", response_model=DevicePublic)
def get_device(device_id: str, database: DatabaseDep) -> Any:
    return database.devices.get(device_id)


@for_admins.patch("/devices/{device_id:path}", response_model=DevicePublic)
def update_device(device_id: str, changes: DeviceUpdate, database: DatabaseDep) -> Any:
    return database.devices.update(device_id, changes)


@for_admins.post("/devices/approve/{device_id:path}")
def approve_device(
    device_id: str,
    database: DatabaseDep,
    expected_role: Role,
    expected_paired_at: Timestamp,
    expected_status: DeviceStatus = DeviceStatus.PENDING,
) -> Changed:
    # The `expected_` arguments contain the state of the device that the admin saw. If the device has been replaced
    # or revoked since then, the reply has status 409.
    changed = database.devices.approve(
        device_id,
        expected_role=expected_role,
        expected_paired_at=expected_paired_at,
        expected_status=expected_status,
    )
    return Changed(changed=changed)


@for_admins.post("/devices/revoke/{device_id:path}")
def revoke_device(device_id: str, database: DatabaseDep, reason: str | None = None, force: bool = False) -> Changed:
    return Changed(changed=database.devices.revoke(device_id, reason=reason, force=force))


@for_admins.post("/agents", status_code=201, response_model=AgentPublic)
def create_agent(request: AgentCreate, database: DatabaseDep) -> Any:
    return database.agents.create(request)


@for_devices.get("/agents", response_model=list[AgentPublic])
def list_agents(database: DatabaseDep, limit: Limit = 100, after: str | None = None) -> Any:
    return database.agents.list(limit=limit, after=after)


@for_devices.get("/agents/{agent_id:path}", response_model=AgentPublic)
def get_agent(agent_id: str, database: DatabaseDep) -> Any:
    return database.agents.get(agent_id)


@for_admins.patch("/agents/{agent_id:path}", response_model=AgentPublic)
def update_agent(agent_id: str, changes: AgentUpdate, database: DatabaseDep) -> Any:
    return database.agents.update(agent_id, changes)


@for_admins.delete("/agents/{agent_id:path}")
def delete_agent(agent_id: str, database: DatabaseDep, delete_sessions: bool = False) -> Changed:
    return Changed(changed=database.agents.delete(agent_id, delete_sessions=delete_sessions))


@for_devices.post("/sessions", status_code=201, response_model=AgentSessionPublic)
def create_session(request: AgentSessionCreate, database: DatabaseDep) -> Any:
    return database.sessions.create(request)


@for_devices.post("/sessions/resolve", response_model=AgentSessionPublic)
def resolve_session(
    agent_id: str, database: DatabaseDep, sender_id: str | None = None, channel_id: str | None = None
) -> Any:
    return database.sessions.resolve(agent_id=agent_id, sender_id=sender_id, channel_id=channel_id)


@for_devices.get("/sessions", response_model=list[AgentSessionPublic])
def list_sessions(
    database: DatabaseDep,
    agent_id: str | None = None,
    sender_id: str | None = None,
    channel_id: str | None = None,
    limit: Limit = 100,
    after: str | None = None,
    after_active_at: Timestamp | None = None,
) -> Any:
    last = None if after is None else database.sessions.get(after)
    if last is not None and after_active_at is not None:
        # Use the time from the previous page, because the session can have a later activity now.
        last = last.model_copy(update={"last_active_at": after_active_at})
    return database.sessions.list(
        agent_id=agent_id, sender_id=sender_id, channel_id=channel_id, limit=limit, after=last
    )


@for_devices.get("/sessions/{session_id:path}", response_model=AgentSessionPublic)
def get_session(session_id: str, database: DatabaseDep) -> Any:
    return database.sessions.get(session_id)


@for_devices.post("/sessions/touch/{session_id:path}")
def touch_session(session_id: str, database: DatabaseDep) -> Changed:
    # In a unit, no other writer can delete the session between `get()` and `touch()`.
    with database.unit_of_work() as unit:
        unit.sessions.get(session_id)
        return Changed(changed=unit.sessions.touch(session_id))


@for_all.websocket("/ws")
async def resolve_sessions(websocket: WebSocket, database: DatabaseDep) -> None:
    """Receive the id of an agent, and answer with the session of the device and the agent."""
    async with accept_device(websocket, database) as device:
        async for agent_id in websocket.iter_text():
            session = await database.arun(partial(find_session, agent_id=agent_id, device_id=device.id))
            await websocket.send_text(AgentSessionPublic.model_validate(session).model_dump_json(by_alias=True))


def find_session(unit: UnitOfWork, *, agent_id: str, device_id: str) -> AgentSession:
    return unit.sessions.resolve(agent_id=agent_id, sender_id=device_id)


def create_app(target: str | PathLike[str] | Database | None = None) -> FastAPI:
    """Return the application, which opens the database of `target`, or uses an open database."""
    app = FastAPI(title="HomeAgent", lifespan=lifespan(target))
    install_error_handlers(app)
    for router in (for_all, for_devices, for_admins, health_router):
        app.include_router(router)
    return app
