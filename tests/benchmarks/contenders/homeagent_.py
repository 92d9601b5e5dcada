"""homeagent, by its public interface alone: one unit of work for each piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

from homeagent.engine.sqlite.driver import choose_driver

from homeagent import (
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    Attempt,
    Database,
    DeviceCreate,
    IdempotencyScope,
    Role,
    errors,
)
from tests.benchmarks.contender import FINGERPRINT, LEASE, Contender
from tests.benchmarks.data import METHOD

__all__ = ["HomeAgent"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
LEASE_TIME = timedelta(milliseconds=LEASE)


def instant(milliseconds: int) -> datetime:
    """Return the instant of a number of milliseconds."""
    return EPOCH + timedelta(milliseconds=milliseconds)


class HomeAgent(Contender):
    """The stores of this package."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        options: dict[str, Any] = {"clock": lambda: instant(self.moment)} if traced else {}
        if "://" not in target:
            options["durability"] = durability
        self.database = Database.open(target, **options)

    @classmethod
    def describe(cls) -> str:
        """Return the version, and the SQLite it picked."""
        driver = choose_driver()
        return f"{version('homeagent')}, {driver.name}, SQLite {driver.version_text}"

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make instants of numbers, and models of sessions."""
        if work == "consume":
            return [(device_id, nonce, instant(expires_at)) for device_id, nonce, expires_at in arguments]
        if work == "index":
            return [([_session(row) for row in rows],) for (rows,) in arguments]
        return arguments

    def until(self, milliseconds: int) -> datetime:
        """Return an instant."""
        return instant(milliseconds)

    def device(self, device_id: str) -> Any:
        """Find a device."""
        with self.database.unit_of_work(read_only=True) as unit:
            return unit.devices.find_by_id(device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        with self.database.unit_of_work(read_only=True) as unit:
            return unit.idempotency_keys.find(IdempotencyScope(device_id=device_id, method=method, key=key))

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        with self.database.unit_of_work(read_only=True) as unit:
            return unit.sessions.list(agent_id=agent_id, limit=limit)

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with self.database.unit_of_work() as unit:
            return unit.devices.update_last_seen(device_id)

    def consume(self, device_id: str, nonce: str, expires_at: datetime) -> bool:
        """Use up a nonce."""
        with self.database.unit_of_work() as unit:
            return unit.nonces.consume(device_id, nonce, expires_at=expires_at)

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        try:
            with self.database.unit_of_work() as unit:
                unit.idempotency_keys.insert(
                    IdempotencyScope(device_id=device_id, method=method, key=key), result, ttl=DAY
                )
        except errors.IdempotencyKeyExistsError:
            return False
        return True

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        scope = IdempotencyScope(device_id=device_id, method=method, key=key)
        with self.database.unit_of_work() as unit:
            attempt = unit.idempotency_keys.claim(scope, fingerprint=FINGERPRINT, lease=LEASE_TIME, ttl=DAY)
        if not isinstance(attempt, Attempt):
            return False
        with self.database.unit_of_work() as unit:
            unit.idempotency_keys.complete(attempt, result)
        return True

    def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions."""
        with self.database.unit_of_work() as unit:
            return unit.sessions.index(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device; its secret was hashed elsewhere, which is not what is measured."""
        with self.database.unit_of_work(read_only=True) as unit:
            if unit.devices.find_by_id(device_id) is not None:
                return
        with self.database.unit_of_work() as unit:
            unit.devices.create(
                DeviceCreate(id=device_id, role=Role.CLIENT, shared_secret_hash=f"sha256$of-{device_id}")
            )
        with self.database.unit_of_work() as unit:
            unit.devices.approve(device_id, expected_role=Role.CLIENT)

    def answer(self, event: Any) -> bool:
        """Take a message."""
        device_id, agent_id, session_id = event["device"], event["agent"], event["session"]
        scope = IdempotencyScope(device_id=device_id, method=METHOD, key=event["key"])
        with self.database.unit_of_work() as unit:
            unit.devices.update_last_seen(device_id)
            if unit.agents.find_by_id(agent_id) is None:
                unit.agents.create(
                    AgentCreate(id=agent_id, name=agent_id.title(), workspace_path=f"/srv/agents/{agent_id}")
                )
            if unit.sessions.find_by_id(session_id) is None:
                unit.sessions.create(
                    AgentSessionCreate(
                        session_id=session_id,
                        agent_id=agent_id,
                        sender_id=event["sender"],
                        channel_id=event["channel"],
                    )
                )
            unit.sessions.touch(session_id)
            if unit.idempotency_keys.find(scope) is not None:
                return True
            unit.idempotency_keys.insert(scope, {"session": session_id, "accepted_at": self.moment}, ttl=DAY)
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        report = self.database.sweep()
        return report.nonces + report.idempotency_keys

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def _session(row: Sequence[Any]) -> AgentSession:
    session_id, agent_id, sender_id, channel_id, created_at, last_active_at = row
    return AgentSession(
        session_id=session_id,
        agent_id=agent_id,
        sender_id=sender_id,
        channel_id=channel_id,
        created_at=instant(created_at),
        last_active_at=instant(last_active_at),
    )
