"""The operational store of HomeAgent: who may enter and what happened, in one SQLite file or on PostgreSQL.

`Database.open` is the door; everything else is reached from there. Names without a leading underscore that are
listed here, in `homeagent.errors` and in `homeagent.stores` are public.
"""

from typing import TYPE_CHECKING

from homeagent import errors, maintenance
from homeagent.clock import Clock
from homeagent.database import Database
from homeagent.late_import import late_names
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
from homeagent.stores import Freshness, ReplayGuard
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from homeagent.credentials import hash_secret
    from homeagent.maintenance.copying import CopyProgress, CopyReport
    from homeagent.maintenance.doctor import Diagnosis, Finding, diagnose
    from homeagent.maintenance.epochs import EpochReport
    from homeagent.maintenance.reporting import DatabaseCounters, DatabaseStatus
    from homeagent.maintenance.restoring import RestoreReport
    from homeagent.maintenance.sweeping import BackupSchedule, Sweeper, SweepReport
    from homeagent.models.shapes import (
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
    "BackupSchedule",
    "Clock",
    "CopyProgress",
    "CopyReport",
    "Database",
    "DatabaseCounters",
    "DatabaseStatus",
    "Device",
    "DeviceCreate",
    "DevicePair",
    "DevicePublic",
    "DeviceStatus",
    "DeviceUpdate",
    "Diagnosis",
    "EpochReport",
    "Finding",
    "Freshness",
    "IdempotencyKey",
    "IdempotencyScope",
    "IdempotencyState",
    "Nonce",
    "Outcome",
    "PairedDevice",
    "ReplayGuard",
    "RestoreReport",
    "Role",
    "SecretCheck",
    "SweepReport",
    "Sweeper",
    "UnitOfWork",
    "__version__",
    "diagnose",
    "errors",
    "hash_secret",
]

# Opening a database needs none of these, and a process starts sooner without them.
_LATE = {
    **dict.fromkeys(maintenance.__all__, "maintenance"),
    "__version__": "version",
    "AgentCreate": "models.shapes",
    "AgentPublic": "models.shapes",
    "AgentSessionCreate": "models.shapes",
    "AgentSessionPublic": "models.shapes",
    "AgentUpdate": "models.shapes",
    "DeviceCreate": "models.shapes",
    "DevicePair": "models.shapes",
    "DevicePublic": "models.shapes",
    "DeviceUpdate": "models.shapes",
    "Finding": "maintenance.doctor",
    "PairedDevice": "models.shapes",
    "SecretCheck": "models.shapes",
    "diagnose": "maintenance.doctor",
    "hash_secret": "credentials",
}


# Hidden from type checkers, which would take any misspelt name for one of these.
if not TYPE_CHECKING:
    __getattr__ = late_names(__name__, _LATE)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
