"""Stores: classes with methods that read and write the tables."""

from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import Freshness, NonceStore, ReplayGuard
from homeagent.stores.sessions import SessionStore

__all__ = ["AgentStore", "DeviceStore", "Freshness", "IdempotencyKeyStore", "NonceStore", "ReplayGuard", "SessionStore"]
