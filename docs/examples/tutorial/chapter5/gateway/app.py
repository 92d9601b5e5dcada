"""The HTTP application of the gateway."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, WebSocket

from gateway.readings import GatewayUnit
from homeagent import Database
from homeagent.fastapi import accept_device, get_database, health_router, install_error_handlers, lifespan

router = APIRouter()


@router.websocket("/ws")
async def measure(websocket: WebSocket, database: Annotated[Database[GatewayUnit], Depends(get_database)]) -> None:
    async with accept_device(websocket, database) as device:
        async for text in websocket.iter_text():
            try:
                added = partial(add, device_id=device.id, celsius=float(text))
                await websocket.send_text(await database.arun(added))
            except ValueError:  # also Pydantic's ValidationError
                await websocket.send_text("The text is not a temperature.")


def add(uow: GatewayUnit, device_id: str, celsius: float) -> str:
    """Add a reading, and return the mean of the latest readings. Both steps are in the same transaction."""
    uow.readings.add(device_id, celsius)
    latest = [reading.celsius for reading in uow.readings.latest(device_id)]
    return f"mean of {len(latest)}: {sum(latest) / len(latest):.1f}"


def create_app(target: Database[GatewayUnit] | None = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan(target, unit=GatewayUnit, migrations="gateway:migrations"))
    install_error_handlers(app)
    app.include_router(router)
    app.include_router(health_router)
    return app
