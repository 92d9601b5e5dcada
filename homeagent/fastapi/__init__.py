"""Integration with FastAPI. Install the extra `homeagent[fastapi]`.

| name | purpose |
|---|---|
| `lifespan` | open, sweep and close the database together with the application |
| `DatabaseDep` | dependency: the open database |
| `CurrentDevice`, `require_role` | dependencies: the approved device that sent the request |
| `idempotent`, `Once` | run an effect once for each Idempotency-Key of a device |
| `signed_webhook`, `Webhook` | run an effect once for each message of a Standard Webhooks sender |
| `accept_device` | accept a WebSocket from a device, until the device loses its access |
| `install_error_handlers`, `ErrorReply`, `error_replies` | problem details (RFC 9457) for each error |
| `health_router` | `GET /health` |
"""

from homeagent.fastapi.authentication import CurrentDevice, bearer_token, current_device, require_role
from homeagent.fastapi.lifespan import DatabaseDep, get_database, health_router, lifespan
from homeagent.fastapi.once import Once, idempotent
from homeagent.fastapi.problems import ErrorReply, error_replies, install_error_handlers
from homeagent.fastapi.webhooks import Webhook, signed_webhook
from homeagent.fastapi.websocket import accept_device

__all__ = [
    "CurrentDevice",
    "DatabaseDep",
    "ErrorReply",
    "Once",
    "Webhook",
    "accept_device",
    "bearer_token",
    "current_device",
    "error_replies",
    "get_database",
    "health_router",
    "idempotent",
    "install_error_handlers",
    "lifespan",
    "require_role",
    "signed_webhook",
]
