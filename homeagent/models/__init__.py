"""The domain: five tables that are Pydantic models as well, and the shapes that create, patch and show their rows.

A sixth, `store`, has one row, about the store itself.
"""

from homeagent.models.agent import Agent, AgentCreate, AgentPublic, AgentUpdate
from homeagent.models.base import metadata
from homeagent.models.device import Device, DeviceCreate, DevicePair, DevicePublic, DeviceStatus, DeviceUpdate, Role
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.session import AgentSession, AgentSessionCreate, AgentSessionPublic
from homeagent.models.store_record import StoreRecord

__all__ = [
    "DATA_TABLES",
    "TABLES",
    "Agent",
    "AgentCreate",
    "AgentPublic",
    "AgentSession",
    "AgentSessionCreate",
    "AgentSessionPublic",
    "AgentUpdate",
    "Attempt",
    "Device",
    "DeviceCreate",
    "DevicePair",
    "DevicePublic",
    "DeviceStatus",
    "DeviceUpdate",
    "IdempotencyKey",
    "IdempotencyScope",
    "IdempotencyState",
    "Nonce",
    "Outcome",
    "Role",
    "StoreRecord",
    "metadata",
]

TABLES: tuple[str, ...] = tuple(sorted(metadata.tables))
"""Every table of the schema but Alembic's."""

DATA_TABLES: tuple[str, ...] = tuple(sorted(set(metadata.tables) - {StoreRecord.__tablename__}))
"""The tables that hold an application's rows, by name: all but `store`."""
