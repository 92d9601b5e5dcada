"""The operational store of HomeAgent: who may enter and what happened, in one SQLite file or on PostgreSQL.

`Database.open` is the door; everything else is reached from there. Names without a leading underscore that are
listed here, in `homeagent.errors` and in `homeagent.stores` are public.
"""

from typing import TYPE_CHECKING

from homeagent import errors
from homeagent.clock import Clock
from homeagent.database import Database
from homeagent.lazy_import import lazy_names
from homeagent.models import (
    Agent,
    AgentSession,
    Attempt,
    Device,
    DeviceStatus,
    IdempotencyKey,
    IdempotencyScope,
    IdempotencyState,
    Nonce,
    Outcome,
    Role,
)
from homeagent.models.schemas import (
    AgentCreate,
    AgentPublic,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentUpdate,
    DeviceCreate,
    DevicePair,
    DevicePublic,
    DeviceUpdate,
    PairedDevice,
    SecretCheck,
)
from homeagent.stores import Freshness, ReplayGuard
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from homeagent.credentials import hash_secret
    from homeagent.maintenance.doctor import diagnose
    from homeagent.version import __version__

__all__ = [
    "Agent",
    "AgentCreate",
    "AgentPublic",
    "AgentSession",
    "AgentSessionCreate",
    "AgentSessionPublic",
    "AgentUpdate",
    "Attempt",
    "Clock",
    "Database",
    "Device",
    "DeviceCreate",
    "DevicePair",
    "DevicePublic",
    "DeviceStatus",
    "DeviceUpdate",
    "Freshness",
    "IdempotencyKey",
    "IdempotencyScope",
    "IdempotencyState",
    "Nonce",
    "Outcome",
    "PairedDevice",
    "ReplayGuard",
    "Role",
    "SecretCheck",
    "UnitOfWork",
    "__version__",
    "diagnose",
    "errors",
    "hash_secret",
]

# Opening a database needs none of these, and a process starts sooner without them.
_LAZY = {
    "__version__": "version",
    "diagnose": "maintenance.doctor",
    "hash_secret": "credentials",
}


# Hidden from type checkers, which would take any misspelt name for one of these.
if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
