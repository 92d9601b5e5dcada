"""The operational store of a home agent gateway, in one SQLite file or on PostgreSQL.

It holds agents, sessions, devices, used nonces and idempotency keys. `Database.open` is the entry point. The names in
`__all__` of this package, of `homeagent.errors` and of `homeagent.stores` are public.
"""

from typing import TYPE_CHECKING

from homeagent import errors
from homeagent.clock import Clock
from homeagent.database import Database
from homeagent.engine.statements import Statement
from homeagent.lazy_import import lazy_names
from homeagent.models import (
    Agent,
    AgentSession,
    Attempt,
    Device,
    DeviceChange,
    DeviceChangeKind,
    DeviceStatus,
    IdempotencyKey,
    IdempotencyScope,
    IdempotencyState,
    Nonce,
    Outcome,
    Role,
)
from homeagent.models.base import Table
from homeagent.models.limits import Limits
from homeagent.models.schemas import (
    AgentCreate,
    AgentPublic,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentSessionUpdate,
    AgentUpdate,
    DeviceCreate,
    DevicePair,
    DevicePublic,
    DeviceUpdate,
    PairedDevice,
    SecretCheck,
)
from homeagent.models.types import Timestamp
from homeagent.stores import Freshness, ReplayGuard
from homeagent.stores.store import Store
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from homeagent.credentials import hash_secret
    from homeagent.file_names import safe_filename
    from homeagent.maintenance.doctor import diagnose
    from homeagent.version import __version__

__all__ = [
    "Agent",
    "AgentCreate",
    "AgentPublic",
    "AgentSession",
    "AgentSessionCreate",
    "AgentSessionPublic",
    "AgentSessionUpdate",
    "AgentUpdate",
    "Attempt",
    "Clock",
    "Database",
    "Device",
    "DeviceChange",
    "DeviceChangeKind",
    "DeviceCreate",
    "DevicePair",
    "DevicePublic",
    "DeviceStatus",
    "DeviceUpdate",
    "Freshness",
    "IdempotencyKey",
    "IdempotencyScope",
    "IdempotencyState",
    "Limits",
    "Nonce",
    "Outcome",
    "PairedDevice",
    "ReplayGuard",
    "Role",
    "SecretCheck",
    "Statement",
    "Store",
    "Table",
    "Timestamp",
    "UnitOfWork",
    "__version__",
    "diagnose",
    "errors",
    "hash_secret",
    "safe_filename",
]

# Names that opening a database does not need. A process starts sooner without importing them.
_LAZY = {
    "__version__": "version",
    "diagnose": "maintenance.doctor",
    "hash_secret": "credentials",
    "safe_filename": "file_names",
}


# Hide `__getattr__` from type checkers: with it they would accept any misspelt name.
if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
