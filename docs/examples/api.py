"""Serve the store over HTTP. Requests and replies are homeagent's models. Each handler opens its own unit of work.

    uvicorn --factory docs.examples.api:create_app

This example does not authenticate its callers. Add authentication first, because every caller can approve devices.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Query, Response
from pydantic import AwareDatetime, BaseModel

from homeagent import (
    AgentCreate,
    AgentPublic,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentUpdate,
    Database,
    DevicePair,
    DevicePublic,
    DeviceStatus,
    DeviceUpdate,
    Role,
)
from homeagent.fastapi import error_replies, install_error_handlers


class PairReply(BaseModel):
    """Reply to a pairing request: a device that waits for approval, and its secret."""

    device: DevicePublic
    shared_secret: str | None
    """The generated secret, which only this reply shows; null if the device sent its own secret."""


class Changed(BaseModel):
    """Reply that says whether the call changed the row."""

    changed: bool


def create_app(database: Database | None = None) -> FastAPI:
    """Return the application.

    Args:
        database: the store. The application does not close this database. If None, the application opens the default
            database, and closes that database at the end.
    """
    opened = database is None
    store = Database.open() if database is None else database

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if opened:
            store.close()

    app = FastAPI(title="HomeAgent", lifespan=lifespan)
    install_error_handlers(app)
    _add_devices(app, store)
    _add_agents(app, store)
    _add_sessions(app, store)
    return app


# FastAPI runs plain functions in its thread pool. Do not open the unit in a dependency: the unit would stay open while
# FastAPI sends the reply.

# Starlette decodes `%2F` before it searches the route. So the id is the last part of each route, as a `:path`.

LIMIT = Query(default=100, ge=1, le=1000)


def _add_devices(app: FastAPI, database: Database) -> None:
    @app.post("/devices", status_code=201, responses=error_replies(409, 429, 503))
    def pair(request: DevicePair, response: Response) -> PairReply:
        paired = database.pair(request)
        made = paired.shared_secret.get_secret_value() if request.shared_secret is None else None
        response.headers["Cache-Control"] = "no-store"
        return PairReply(device=DevicePublic.model_validate(paired.device), shared_secret=made)

    @app.get("/devices", response_model=list[DevicePublic])
    def list_devices(
        role: Role | None = None, status: DeviceStatus | None = None, limit: int = LIMIT, after: str | None = None
    ) -> list[DevicePublic]:
        with database.unit_of_work(read_only=True) as unit:
            found = unit.devices.list(role=role, status=status, limit=limit, after=after)
        return [DevicePublic.model_validate(device) for device in found]

    @app.get("/devices/{device_id:path}", responses=error_replies(404))
    def get_device(device_id: str) -> DevicePublic:
        with database.unit_of_work(read_only=True) as unit:
            return DevicePublic.model_validate(unit.devices.get(device_id))

    @app.patch("/devices/{device_id:path}", responses=error_replies(404, 503))
    def update_device(device_id: str, changes: DeviceUpdate) -> DevicePublic:
        with database.unit_of_work() as unit:
            return DevicePublic.model_validate(unit.devices.update(device_id, changes))

    @app.post("/devices/approve/{device_id:path}", responses=error_replies(404, 409, 503))
    def approve_device(
        device_id: str,
        expected_role: Role,
        expected_paired_at: AwareDatetime,
        expected_status: DeviceStatus = DeviceStatus.PENDING,
    ) -> Changed:
        # The `expected_` arguments hold the state that the admin saw. If this state has changed, because the device
        # was replaced or revoked, the reply has status 409.
        with database.unit_of_work() as unit:
            changed = unit.devices.approve(
                device_id,
                expected_role=expected_role,
                expected_paired_at=expected_paired_at,
                expected_status=expected_status,
            )
        return Changed(changed=changed)

    @app.post("/devices/revoke/{device_id:path}", responses=error_replies(404, 409, 503))
    def revoke_device(device_id: str, reason: str | None = None, force: bool = False) -> Changed:
        with database.unit_of_work() as unit:
            changed = unit.devices.revoke(device_id, reason=reason, force=force)
        return Changed(changed=changed)


def _add_agents(app: FastAPI, database: Database) -> None:
    @app.post("/agents", status_code=201, responses=error_replies(409, 503))
    def create_agent(request: AgentCreate) -> AgentPublic:
        with database.unit_of_work() as unit:
            return AgentPublic.model_validate(unit.agents.create(request))

    @app.get("/agents")
    def list_agents(limit: int = LIMIT, after: str | None = None) -> list[AgentPublic]:
        with database.unit_of_work(read_only=True) as unit:
            found = unit.agents.list(limit=limit, after=after)
        return [AgentPublic.model_validate(agent) for agent in found]

    @app.get("/agents/{agent_id:path}", responses=error_replies(404))
    def get_agent(agent_id: str) -> AgentPublic:
        with database.unit_of_work(read_only=True) as unit:
            return AgentPublic.model_validate(unit.agents.get(agent_id))

    @app.patch("/agents/{agent_id:path}", responses=error_replies(404, 503))
    def update_agent(agent_id: str, changes: AgentUpdate) -> AgentPublic:
        with database.unit_of_work() as unit:
            return AgentPublic.model_validate(unit.agents.update(agent_id, changes))

    @app.delete("/agents/{agent_id:path}", responses=error_replies(409, 503))
    def delete_agent(agent_id: str, delete_sessions: bool = False) -> Changed:
        with database.unit_of_work() as unit:
            changed = unit.agents.delete(agent_id, delete_sessions=delete_sessions)
        return Changed(changed=changed)


def _add_sessions(app: FastAPI, database: Database) -> None:
    @app.post("/sessions", status_code=201, responses=error_replies(404, 409, 503))
    def create_session(request: AgentSessionCreate) -> AgentSessionPublic:
        with database.unit_of_work() as unit:
            return AgentSessionPublic.model_validate(unit.sessions.create(request))

    @app.post("/sessions/resolve", responses=error_replies(404, 503))
    def resolve_session(
        agent_id: str, sender_id: str | None = None, channel_id: str | None = None
    ) -> AgentSessionPublic:
        with database.unit_of_work() as unit:
            session = unit.sessions.resolve(agent_id=agent_id, sender_id=sender_id, channel_id=channel_id)
            return AgentSessionPublic.model_validate(session)

    @app.get("/sessions", responses=error_replies(404))
    def list_sessions(
        agent_id: str | None = None,
        sender_id: str | None = None,
        channel_id: str | None = None,
        limit: int = LIMIT,
        after: str | None = None,
        after_active_at: AwareDatetime | None = None,
    ) -> list[AgentSessionPublic]:
        with database.unit_of_work(read_only=True) as unit:
            last = None if after is None else unit.sessions.get(after)
            if last is not None and after_active_at is not None:
                # The previous page ended at this time. The session may have been active since then.
                last = last.model_copy(update={"last_active_at": after_active_at})
            found = unit.sessions.list(
                agent_id=agent_id, sender_id=sender_id, channel_id=channel_id, limit=limit, after=last
            )
        return [AgentSessionPublic.model_validate(session) for session in found]

    @app.get("/sessions/{session_id:path}", responses=error_replies(404))
    def get_session(session_id: str) -> AgentSessionPublic:
        with database.unit_of_work(read_only=True) as unit:
            return AgentSessionPublic.model_validate(unit.sessions.get(session_id))

    @app.post("/sessions/touch/{session_id:path}", responses=error_replies(404, 503))
    def touch_session(session_id: str) -> Changed:
        with database.unit_of_work() as unit:
            unit.sessions.get(session_id)
            return Changed(changed=unit.sessions.touch(session_id))
