"""Models of the tables. `homeagent/models/schemas.py` has the models of requests and replies."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from homeagent.models.agent import Agent
from homeagent.models.base import metadata
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.device_change import DeviceChange, DeviceChangeKind
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.proof_parameters import ProofParameters
from homeagent.models.session import AgentSession
from homeagent.models.store_record import store_table

if TYPE_CHECKING:
    from homeagent.models.schemas import (
        AgentCreate,
        AgentSessionCreate,
        AgentSessionUpdate,
        AgentUpdate,
        DeviceCreate,
        DevicePair,
        DeviceUpdate,
        PairedDevice,
        SecretCheck,
    )
else:

    def __getattr__(name):
        # Import the module `schemas` lazily, to shorten the start time.
        schemas = import_module("homeagent.models.schemas")
        if not hasattr(schemas, name):
            raise AttributeError(f"module 'homeagent.models' has no attribute {name!r}")
        globals()[name] = getattr(schemas, name)
        return globals()[name]


# Do not read homeagent's tables from `homeagent.models.metadata.tables`, which also contains the application's tables.
SCHEMA: tuple[Any, ...] = (
    Agent.__table__,
    Device.__table__,
    DeviceChange.__table__,
    IdempotencyKey.__table__,
    Nonce.__table__,
    store_table,
    AgentSession.__table__,
)
"""homeagent's tables except Alembic's. Each table follows the tables that its foreign keys refer to."""

TABLES: tuple[str, ...] = tuple(sorted(table.name for table in SCHEMA))

VERSION_TABLE = "homeagent_schema_version"

APPLICATION_VERSION_TABLE = "application_schema_version"
"""Version table of the application's own revisions."""

DATA_TABLES: tuple[str, ...] = tuple(sorted(set(TABLES) - {store_table.name, DeviceChange.__table__.name}))
"""Names of homeagent's tables with application data: all except `store` and `device_changes`."""
