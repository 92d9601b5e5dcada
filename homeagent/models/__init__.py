"""The domain: five tables that are Pydantic models as well, and the shapes that create, patch and show their rows."""

from homeagent.models.agent import Agent, AgentCreate, AgentPublic, AgentUpdate
from homeagent.models.base import metadata
from homeagent.models.device import Device, DeviceCreate, DevicePair, DevicePublic, DeviceStatus, DeviceUpdate, Role
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.session import AgentSession, AgentSessionCreate, AgentSessionPublic

__all__ = [
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
    "metadata",
]
