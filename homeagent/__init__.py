"""Store the operational data of a gateway for home agents.

The store is one SQLite file, or is on PostgreSQL. The store holds agents, sessions, devices, used nonces and
idempotency keys. `Database.open` is the entry point. The lists `homeagent.__all__`, `homeagent.errors.__all__` and
`homeagent.stores.__all__` contain the public names.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homeagent import errors
    from homeagent.clock import Clock
    from homeagent.credentials import hash_secret
    from homeagent.database import Database
    from homeagent.engine.statements import Statement
    from homeagent.file_names import safe_filename
    from homeagent.maintenance.doctor import diagnose
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
    from homeagent.version import __version__

# fmt: off
__all__ = [
    "Agent", "AgentCreate", "AgentPublic", "AgentSession", "AgentSessionCreate", "AgentSessionPublic",
    "AgentSessionUpdate", "AgentUpdate", "Attempt", "Clock", "Database", "Device", "DeviceChange", "DeviceChangeKind",
    "DeviceCreate", "DevicePair", "DevicePublic", "DeviceStatus", "DeviceUpdate", "Freshness", "IdempotencyKey",
    "IdempotencyScope", "IdempotencyState", "Limits", "Nonce", "Outcome", "PairedDevice", "ReplayGuard", "Role",
    "SecretCheck", "Statement", "Store", "Table", "Timestamp", "UnitOfWork", "__version__", "diagnose", "errors",
    "hash_secret", "safe_filename",
]
# fmt: on

# Import each public name at its first use. Every run of pytest imports the plugin `homeagent.testing`. The plugin must
# not import the whole package.
_LAZY = {
    "Clock": "clock",
    "Database": "database",
    "Freshness": "stores",
    "Limits": "models.limits",
    "ReplayGuard": "stores",
    "Statement": "engine.statements",
    "Store": "stores.store",
    "Table": "models.base",
    "Timestamp": "models.types",
    "UnitOfWork": "unit_of_work",
    "__version__": "version",
    "diagnose": "maintenance.doctor",
    "hash_secret": "credentials",
    "safe_filename": "file_names",
}
"""Modules of the public names. The other public classes are in the package `homeagent.models`."""
_MODULES = ("errors", "maintenance", "models", "stores")
"""Modules that are attributes of the package after `import homeagent`."""


# Hide the function `__getattr__` from type checkers, which would otherwise accept misspelt names.
if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"homeagent.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'homeagent' has no attribute {name!r}")
        globals()[name] = getattr(import_module(f"homeagent.{_LAZY.get(name, 'models')}"), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
