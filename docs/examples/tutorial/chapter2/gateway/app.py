"""The HTTP application of the gateway."""

from fastapi import APIRouter, FastAPI, WebSocket

from homeagent import Database
from homeagent.fastapi import DatabaseDep, accept_device, lifespan

router = APIRouter()


@router.websocket("/ws")
async def measure(websocket: WebSocket, database: DatabaseDep) -> None:
    async with accept_device(websocket, database) as device:
        async for text in websocket.iter_text():
            await websocket.send_text(f"{device.id} sent {text}")


def create_app(target: str | Database = "data/gateway.db") -> FastAPI:
    app = FastAPI(lifespan=lifespan(target))
    app.include_router(router)
    return app
