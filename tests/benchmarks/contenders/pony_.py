"""Pony: entities, generators as queries, and `db_session` for each call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pony.orm import Database, Optional, PrimaryKey, Required, commit, db_session, desc, select

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, SESSION_COLUMNS, Contender
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["Pony"]

database: Any = Database()
Entity: Any = database.Entity


def text() -> Any:
    """Return an attribute that is text or null."""
    return Optional(str, nullable=True)


def number() -> Any:
    """Return an attribute that is an integer of 64 bits or null."""
    return Optional(int, size=64)


class Device(Entity):
    """A row of `devices`."""

    _table_ = "devices"
    id = PrimaryKey(str)
    role = Required(str)
    shared_secret_hash = Required(str)
    approved = Required(int, default=0)
    paired_at = Required(int, size=64)
    last_seen_at = number()
    metadata = text()
    approved_at = number()
    revoked_at = number()
    revoked_reason = text()
    previous_secret_hash = text()
    previous_secret_expires_at = number()
    proof_verifier = text()


class Agent(Entity):
    """A row of `agents`."""

    _table_ = "agents"
    id = PrimaryKey(str)
    name = Required(str)
    workspace_path = Required(str)
    created_at = Required(int, size=64)
    config = text()


class AgentSession(Entity):
    """A row of `sessions`."""

    _table_ = "sessions"
    session_id = PrimaryKey(str)
    agent_id = Required(str)
    sender_id = text()
    channel_id = text()
    created_at = Required(int, size=64)
    last_active_at = Required(int, size=64)
    route_key = text()


class Nonce(Entity):
    """A row of `nonces`."""

    _table_ = "nonces"
    device_id = Required(str)
    nonce = Required(str)
    created_at = Required(int, size=64)
    expires_at = Required(int, size=64)
    PrimaryKey(device_id, nonce)


class IdempotencyKey(Entity):
    """A row of `idempotency_keys`."""

    _table_ = "idempotency_keys"
    device_id = Required(str)
    method = Required(str)
    key = Required(str)
    result = Required(str)
    created_at = Required(int, size=64)
    expires_at = Required(int, size=64)
    state = Required(str, default="completed")
    fingerprint = text()
    owner = text()
    attempt = Required(int, default=1)
    lease_expires_at = number()
    downstream_key = text()
    omitted = Required(int, default=0)
    PrimaryKey(device_id, method, key)


class Pony(Contender):
    """Entities."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)

        @database.on_connect(provider="sqlite")
        def set_pragmas(database: Any, connection: Any) -> None:
            for pragma in (*PRAGMAS, f"synchronous={durability}"):
                connection.execute(f"PRAGMA {pragma}")

        database.bind(provider="sqlite", filename=target)
        database.generate_mapping(create_tables=False)

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("pony")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make the values of sessions."""
        if work == "index":
            return [
                ([dict(zip(SESSION_COLUMNS, (*row, route_key(*row[1:4])), strict=True)) for row in rows],)
                for (rows,) in arguments
            ]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        with db_session:
            return Device.get(id=device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        with db_session:
            return self._live_key(device_id, method, key)

    def _live_key(self, device_id: str, method: str, key: str) -> Any:
        row = IdempotencyKey.get(device_id=device_id, method=method, key=key)
        if row is None or (row.expires_at <= self.now() and row.state != "in_progress"):
            return None
        return row

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        with db_session:
            found = select(row for row in AgentSession if row.agent_id == agent_id)
            return list(found.order_by(desc(AgentSession.last_active_at), desc(AgentSession.session_id))[:limit])

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with db_session(immediate=True):
            return self._see(device_id)

    def _see(self, device_id: str) -> bool:
        now = self.now()
        device = Device.get(id=device_id)
        if device is None or (device.last_seen_at is not None and device.last_seen_at > now - GRANULARITY):
            return False
        device.last_seen_at = now
        return True

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        with db_session(immediate=True):
            row = Nonce.get(device_id=device_id, nonce=nonce)
            if row is None:
                Nonce(device_id=device_id, nonce=nonce, created_at=now, expires_at=expires_at)
            elif row.expires_at > now:
                return False
            else:
                row.created_at, row.expires_at = now, expires_at
        return True

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with db_session(immediate=True):
            return self._store(device_id, method, key, result)

    def _store(self, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        scope = {"device_id": device_id, "method": method, "key": key}
        row = IdempotencyKey.get(**scope)
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return False
            row.delete()
            commit()
        values = {"result": json.dumps(result), "created_at": now, "expires_at": now + DAY, **others}
        IdempotencyKey(**scope, **values)
        return True

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        with db_session(immediate=True):
            if not self._store(device_id, method, key, None, **claimed):
                return False
        with db_session(immediate=True):
            row = IdempotencyKey.get(device_id=device_id, method=method, key=key)
            if row is None or row.owner != owner:
                return False
            row.set(state="completed", result=json.dumps(result), lease_expires_at=None)
        return True

    def index(self, sessions: Sequence[dict[str, Any]]) -> int:
        """Add sessions, which are new."""
        with db_session(immediate=True):
            for row in sessions:
                AgentSession(**row)
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        with db_session(immediate=True):
            if Device.get(id=device_id) is not None:
                return
            secret = f"sha256$of-{device_id}"
            Device(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now())
        with db_session(immediate=True):
            Device.get(id=device_id).set(approved=1, approved_at=self.now())

    def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        with db_session(immediate=True):
            self._see(event["device"])
            if Agent.get(id=agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                Agent(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now)
            row = AgentSession.get(session_id=session_id)
            if row is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = AgentSession.select(lambda each: each.route_key == route).first()
                values = (session_id, agent_id, sender, channel, now, now, None if taken else route)
                row = AgentSession(**dict(zip(SESSION_COLUMNS, values, strict=True)))
            row.last_active_at = max(now, row.last_active_at)
            if self._live_key(event["device"], METHOD, event["key"]) is not None:
                return True
            self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for entity, before in ((Nonce, now - GRACE), (IdempotencyKey, now)):
            count = BATCH
            while count == BATCH:
                count = self._delete_some(entity, before)
                total += count
        return total

    @staticmethod
    def _delete_some(entity: Any, before: int) -> int:
        # A function of its own: Pony reads the lambda's code, and takes neither a default nor a loop's variable.
        with db_session(immediate=True):
            rows = list(entity.select(lambda row: row.expires_at <= before).order_by(entity.expires_at)[:BATCH])
            for row in rows:
                row.delete()
            return len(rows)

    def close(self) -> None:
        """Close the connections."""
        database.disconnect()
