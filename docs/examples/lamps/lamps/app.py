"""The application: pairing and approval over HTTP, and lamps over HTTP and over a WebSocket."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, WebSocket, WebSocketException
from pydantic import BaseModel, Field, JsonValue, ValidationError

from homeagent import Attempt, Database, DevicePair, DevicePublic, DeviceStatus, IdempotencyScope, Role, Timestamp
from homeagent.errors import HomeAgentError
from homeagent.fastapi import (
    CurrentDevice,
    Once,
    accept_device,
    get_database,
    health_router,
    idempotent,
    install_error_handlers,
    lifespan,
    require_role,
)
from lamps.tables import LampUnit, SwitchStore

LampDatabase = Annotated[Database[LampUnit], Depends(get_database)]
# The effect can run twice without harm, because `switch_once` recognises the second run by the downstream key.
Repeatable = Annotated[Once, Depends(idempotent(on_abandoned="rerun"))]
router = APIRouter()


class Call(BaseModel):
    """A call over the WebSocket. If a device gets no reply, the device sends the call again with the same id."""

    id: str = Field(min_length=1, max_length=100)
    lamp: str
    on: bool


@router.post("/devices", status_code=201)
def pair(request: DevicePair, database: LampDatabase) -> dict[str, str]:
    return {"secret": database.pair(request).shared_secret.get_secret_value()}


@router.get("/devices", dependencies=[Depends(require_role(Role.ADMIN))], response_model=list[DevicePublic])
def pending_devices(database: LampDatabase) -> Any:
    return database.devices.list(status=DeviceStatus.PENDING)


@router.post("/devices/approve/{device_id:path}", dependencies=[Depends(require_role(Role.ADMIN))])
def approve(device_id: str, role: Role, paired_at: Timestamp, database: LampDatabase) -> bool:
    return database.devices.approve(device_id, expected_role=role, expected_paired_at=paired_at)


@router.put("/lamps/{lamp}/{on}")
async def switch(lamp: str, on: bool, device: CurrentDevice, database: LampDatabase, once: Repeatable) -> Any:
    def effect(attempt: Attempt) -> JsonValue:
        call = Call(id=attempt.downstream_key, lamp=lamp, on=on)
        database.run(partial(switch_once, device_id=device.id, call=call), idempotent=True)
        return {"lamp": lamp, "on": on}

    return await once(effect)


@router.get("/lamps/{lamp}")
def history(lamp: str, device: CurrentDevice, database: LampDatabase) -> list[bool]:
    return [each.on for each in database.store(SwitchStore).of_lamp(lamp)]


@router.websocket("/ws")
async def answer_calls(websocket: WebSocket, database: LampDatabase) -> None:
    async with accept_device(websocket, database) as device:
        async for text in websocket.iter_text():
            try:
                call = Call.model_validate_json(text)
            except ValidationError:
                raise WebSocketException(1007, "the call is invalid") from None
            try:
                result = await database.arun(partial(switch_once, device_id=device.id, call=call), idempotent=True)
                await websocket.send_json({"id": call.id, "result": result})
            except HomeAgentError as error:
                await websocket.send_json({"id": call.id, "error": type(error).__name__})


def switch_once(uow: LampUnit, device_id: str, call: Call) -> JsonValue:
    """Switch a lamp, unless the device has made the same call before. One commit stores the row and the result."""

    def effect(attempt: Attempt) -> JsonValue:
        uow.switches.add(device_id, call.lamp, call.on)
        return call.on

    scope = IdempotencyScope(device_id=device_id, method="lamps.switch", key=call.id)
    return uow.run_once(scope, effect, params=call.model_dump(exclude={"id"})).value


def create_app(target: Database[LampUnit] | None = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan(target, unit=LampUnit, migrations="lamps:migrations"))
    install_error_handlers(app)
    app.include_router(router)
    app.include_router(health_router)
    return app
