"""The domain: five tables that are Pydantic models as well. What creates, patches and shows their rows is in `schemas`.

A sixth table, `store`, has one row, about the store itself.
"""

import os
from typing import TYPE_CHECKING

from homeagent.lazy_import import lazy_names
from homeagent.models.agent import Agent
from homeagent.models.base import Model, metadata
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.session import AgentSession
from homeagent.models.store_record import store_table

if TYPE_CHECKING:
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
    "Role",
    "SecretCheck",
    "metadata",
    "store_table",
]

_SCHEMAS = (
    "AgentCreate",
    "AgentSessionCreate",
    "AgentUpdate",
    "DeviceCreate",
    "DevicePair",
    "DeviceUpdate",
    "PairedDevice",
    "SecretCheck",
)

TABLES: tuple[str, ...] = tuple(sorted(metadata.tables))
"""Every table of the schema but Alembic's."""

DATA_TABLES: tuple[str, ...] = tuple(sorted(set(metadata.tables) - {store_table.name}))
"""The tables that hold an application's rows, by name: all but `store`."""


# Hidden from type checkers, which would take any misspelt name for one of these.
if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, dict.fromkeys(_SCHEMAS, "schemas"))


def _build(model: type[Model]) -> None:
    for subclass in model.__subclasses__():
        subclass.model_rebuild(raise_errors=False)
        _build(subclass)


def _build_all() -> None:
    from homeagent.models import schemas  # noqa: F401  so that they are among the subclasses

    _build(Model)


# Where another thread was building a model at the fork, a child would wait for Pydantic's lock for ever.
os.register_at_fork(before=_build_all)
