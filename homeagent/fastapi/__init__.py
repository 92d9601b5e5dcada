"""Integration with FastAPI. Install the extra `homeagent[fastapi]`."""

from homeagent.fastapi.authentication import CurrentDevice, bearer_token, current_device, require_role
from homeagent.fastapi.lifespan import DatabaseDep, get_database, health_router, lifespan
from homeagent.fastapi.once import Once, idempotent
from homeagent.fastapi.problems import ErrorReply, install_error_handlers
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
    "get_database",
    "health_router",
    "idempotent",
    "install_error_handlers",
    "lifespan",
    "require_role",
    "signed_webhook",
]
