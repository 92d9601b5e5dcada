"""The domain: five tables that are Pydantic models as well, and the shapes that create, patch and show their rows.

A sixth, `store`, has one row, about the store itself.
"""

import os
from typing import TYPE_CHECKING, Any

from homeagent.models.agent import Agent
from homeagent.models.base import Model, metadata
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.nonce import Nonce
from homeagent.models.session import AgentSession
from homeagent.models.store_record import store_table

if TYPE_CHECKING:
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
    )

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
    "metadata",
    "store_table",
]

TABLES: tuple[str, ...] = tuple(sorted(metadata.tables))
"""Every table of the schema but Alembic's."""

DATA_TABLES: tuple[str, ...] = tuple(sorted(set(metadata.tables) - {store_table.name}))
"""The tables that hold an application's rows, by name: all but `store`."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        from homeagent.models import shapes

        return getattr(shapes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _build(model: type[Model]) -> None:
    for subclass in model.__subclasses__():
        subclass.model_rebuild(raise_errors=False)
        _build(subclass)


def _build_all() -> None:
    from homeagent.models import shapes  # noqa: F401  so that they are among the subclasses

    _build(Model)


# Where another thread was building a model at the fork, a child would wait for Pydantic's lock for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_build_all)
