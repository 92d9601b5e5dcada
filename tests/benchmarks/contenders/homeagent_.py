"""homeagent by its public interface: each call is one unit of work."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from homeagent import (
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    Database,
    Device,
    DeviceCreate,
    IdempotencyKey,
    IdempotencyScope,
    Role,
    UnitOfWork,
    errors,
)
from tests.benchmarks.contender import METHOD, RESULT, SECRET_HASH, START, Clock, Event, Filled

DAY = timedelta(days=1)


def scope(device_id: str, key: str) -> IdempotencyScope:
    """Return the scope of a key."""
    return IdempotencyScope(device_id=device_id, method=METHOD, key=key)


def fill(path: Path | str, filled: Filled) -> None:
    """Create a database with homeagent's tables. `path` may be the URL of a server."""
    clock = Clock()
    with Database.open(path, clock=clock) as database, database.unit_of_work() as uow:
        for i in range(filled.devices):
            _create_device(uow, f"d{i}")
        for i in range(filled.agents):
            uow.agents.create(AgentCreate(id=f"a{i}", name="A", workspace_path="/srv/agent"))
        for i in range(filled.keys):
            uow.idempotency_keys.insert(scope(f"d{i % filled.devices}", f"k{i}"), RESULT, ttl=DAY)
        for i in range(filled.sessions):
            clock.set(START + i)
            uow.sessions.create(
                AgentSessionCreate(
                    session_id=f"s{i}", agent_id=f"a{i % filled.agents}", sender_id=f"u{i}", channel_id=f"c{i % 7}"
                )
            )


def _create_device(uow: UnitOfWork, device_id: str) -> None:
    uow.devices.create(DeviceCreate(id=device_id, role=Role.CLIENT, shared_secret_hash=SECRET_HASH))
    uow.devices.approve(device_id)


class HomeAgent:
    """The stores of this package. `path` may be the URL of a server with its own durability."""

    def __init__(self, path: Path | str, durability: str, clock: Clock) -> None:
        self.clock = clock
        options: dict[str, Any] = {} if "://" in str(path) else {"durability": durability}
        self.database: Database = Database.open(path, clock=clock, **options)

    def device(self, device_id: str) -> Device | None:
        with self.database.unit_of_work(read_only=True) as uow:
            return uow.devices.find_by_id(device_id)

    def find_key(self, device_id: str, key: str) -> IdempotencyKey | None:
        with self.database.unit_of_work(read_only=True) as uow:
            return uow.idempotency_keys.find(scope(device_id, key))

    def sessions(self, agent_id: str, limit: int) -> Sequence[AgentSession]:
        with self.database.unit_of_work(read_only=True) as uow:
            return uow.sessions.list(agent_id=agent_id, limit=limit)

    def seen(self, device_id: str) -> bool:
        with self.database.unit_of_work() as uow:
            return uow.devices.update_last_seen(device_id)

    def consume(self, device_id: str, nonce: str) -> bool:
        with self.database.unit_of_work() as uow:
            return uow.nonces.consume(device_id, nonce, expires_at=self.clock.now + DAY)

    def insert_key(self, device_id: str, key: str) -> bool:
        try:
            with self.database.unit_of_work() as uow:
                uow.idempotency_keys.insert(scope(device_id, key), RESULT, ttl=DAY)
        except errors.IdempotencyKeyExistsError:
            return False
        return True

    def answer(self, event: Event) -> bool:
        device_id, agent_id, session_id = event["device"], event["agent"], event["session"]
        key = scope(device_id, event["key"])
        with self.database.unit_of_work() as uow:
            if uow.devices.find_by_id(device_id) is None:
                _create_device(uow, device_id)
            uow.devices.update_last_seen(device_id)
            if uow.agents.find_by_id(agent_id) is None:
                uow.agents.create(AgentCreate(id=agent_id, name=agent_id, workspace_path="/srv/agent"))
            if uow.sessions.find_by_id(session_id) is None:
                uow.sessions.create(
                    AgentSessionCreate(
                        session_id=session_id, agent_id=agent_id, sender_id=event["sender"], channel_id=event["channel"]
                    )
                )
            uow.sessions.touch(session_id)
            if uow.idempotency_keys.find(key) is not None:
                return True
            uow.idempotency_keys.insert(key, RESULT, ttl=DAY)
            return False

    def close(self) -> None:
        self.database.close()
