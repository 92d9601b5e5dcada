"""Models: five tables, which are also Pydantic models, and the table `store` with a row about the whole database.

The models of requests and replies are in `schemas`.
"""

from homeagent.models.agent import Agent
from homeagent.models.base import metadata
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.proof_parameters import ProofParameters
from homeagent.models.schemas import (
    AgentCreate,
    AgentSessionCreate,
    AgentUpdate,
    DeviceCreate,
    DevicePair,
    DeviceUpdate,
    PairedDevice,
    SecretCheck,
)
from homeagent.models.session import AgentSession
from homeagent.models.store_record import store_table

__all__ = [
    "DATA_TABLES",
    "TABLES",
    "Agent",
    "AgentCreate",
    "AgentSession",
    "AgentSessionCreate",
    "AgentUpdate",
    "Attempt",
    "Device",
    "DeviceCreate",
    "DevicePair",
    "DeviceStatus",
    "DeviceUpdate",
    "IdempotencyKey",
    "IdempotencyScope",
    "IdempotencyState",
    "Nonce",
    "Outcome",
    "PairedDevice",
    "ProofParameters",
    "Role",
    "SecretCheck",
    "metadata",
    "store_table",
]

TABLES: tuple[str, ...] = tuple(sorted(metadata.tables))
"""Names of all tables except Alembic's."""

DATA_TABLES: tuple[str, ...] = tuple(sorted(set(metadata.tables) - {store_table.name}))
"""Names of the tables with rows of an application: all except `store`."""
