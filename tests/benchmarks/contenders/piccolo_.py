"""Piccolo: asynchronous tables, and `transaction` for each write. It has no composite primary keys.

Its SQLite engine opens a connection for each query or transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from piccolo.columns import BigInt, Integer, Text
from piccolo.engine.sqlite import SQLiteEngine, TransactionType
from piccolo.table import Table

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, SESSION_COLUMNS, AsyncContender
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["PiccoloTables"]

_pragmas = list(PRAGMAS)


class _Connection(sqlite3.Connection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for pragma in _pragmas:
            self.execute(f"PRAGMA {pragma}")


# The file is known only when a contender is made.
engine = SQLiteEngine(path="set later", factory=_Connection)


class Device(Table, tablename="devices", db=engine):
    """A row of `devices`."""

    id = Text(primary_key=True)
    role = Text()
    shared_secret_hash = Text()
    approved = Integer(default=0)
    paired_at = BigInt()
    last_seen_at = BigInt(null=True, default=None)
    metadata = Text(null=True, default=None)
    approved_at = BigInt(null=True, default=None)
    revoked_at = BigInt(null=True, default=None)
    revoked_reason = Text(null=True, default=None)
    previous_secret_hash = Text(null=True, default=None)
    previous_secret_expires_at = BigInt(null=True, default=None)
    proof_verifier = Text(null=True, default=None)


class Agent(Table, tablename="agents", db=engine):
    """A row of `agents`."""

    id = Text(primary_key=True)
    name = Text()
    workspace_path = Text()
    created_at = BigInt()
    config = Text(null=True, default=None)


class AgentSession(Table, tablename="sessions", db=engine):
    """A row of `sessions`."""

    session_id = Text(primary_key=True)
    agent_id = Text()
    sender_id = Text(null=True, default=None)
    channel_id = Text(null=True, default=None)
    created_at = BigInt()
    last_active_at = BigInt()
    route_key = Text(null=True, default=None)


class Nonce(Table, tablename="nonces", db=engine):
    """A row of `nonces`."""

    nonce = Text(primary_key=True)
    device_id = Text()
    created_at = BigInt()
    expires_at = BigInt()


class IdempotencyKey(Table, tablename="idempotency_keys", db=engine):
    """A row of `idempotency_keys`."""

    key = Text(primary_key=True)
    method = Text()
    device_id = Text()
    result = Text()
    created_at = BigInt()
    expires_at = BigInt()
    state = Text(default="completed")
    fingerprint = Text(null=True, default=None)
    owner = Text(null=True, default=None)
    attempt = Integer(default=1)
    lease_expires_at = BigInt(null=True, default=None)
    downstream_key = Text(null=True, default=None)
    omitted = Integer(default=0)


def writing() -> Any:
    """Return a transaction that takes the write lock at once."""
    return engine.transaction(transaction_type=TransactionType.immediate)


class PiccoloTables(AsyncContender):
    """Tables."""

    async def open(self) -> None:
        """Name the file."""
        engine.path = self.target
        _pragmas.append(f"synchronous={self.durability}")

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("piccolo")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make tables of sessions."""
        if work == "index":
            return [([_session((*row, route_key(*row[1:4]))) for row in rows],) for (rows,) in arguments]
        return arguments

    async def device(self, device_id: str) -> Any:
        """Find a device."""
        return await Device.objects().get(Device.id == device_id)

    def _same(self, device_id: str, method: str, key: str) -> Any:
        return (IdempotencyKey.device_id == device_id) & (IdempotencyKey.method == method) & (IdempotencyKey.key == key)

    async def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        live = (IdempotencyKey.expires_at > self.now()) | (IdempotencyKey.state == "in_progress")
        return await IdempotencyKey.objects().get(self._same(device_id, method, key) & live)

    async def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        found = AgentSession.objects().where(AgentSession.agent_id == agent_id)
        order = AgentSession.last_active_at, AgentSession.session_id
        return await found.order_by(*order, ascending=False).limit(limit)

    async def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        async with writing():
            return await self._see(device_id)

    async def _see(self, device_id: str) -> bool:
        now = self.now()
        due = Device.last_seen_at.is_null() | (Device.last_seen_at <= now - GRANULARITY)
        update = Device.update({Device.last_seen_at: now}).where((Device.id == device_id) & due)
        return bool(await update.returning(Device.id))

    async def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        same = (Nonce.device_id == device_id) & (Nonce.nonce == nonce)
        async with writing():
            row = await Nonce.objects().get(same)
            if row is None:
                await Nonce.insert(Nonce(nonce=nonce, device_id=device_id, created_at=now, expires_at=expires_at))
                return True
            if row.expires_at > now:
                return False
            await Nonce.update({Nonce.created_at: now, Nonce.expires_at: expires_at}).where(same)
        return True

    async def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        async with writing():
            return await self._store(device_id, method, key, result)

    async def _store(self, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        row = await IdempotencyKey.objects().get(self._same(device_id, method, key))
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return False
            await IdempotencyKey.delete().where(self._same(device_id, method, key))
        scope = {"device_id": device_id, "method": method, "key": key}
        values = {"result": json.dumps(result), "created_at": now, "expires_at": now + DAY, **others}
        await IdempotencyKey.insert(IdempotencyKey(**scope, **values))
        return True

    async def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        async with writing():
            if not await self._store(device_id, method, key, None, **claimed):
                return False
        done = {
            IdempotencyKey.state: "completed",
            IdempotencyKey.result: json.dumps(result),
            IdempotencyKey.lease_expires_at: None,
        }
        owned = self._same(device_id, method, key) & (IdempotencyKey.owner == owner)
        async with writing():
            return bool(await IdempotencyKey.update(done).where(owned).returning(IdempotencyKey.key))

    async def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions, or move on those that exist, in batches below SQLite's limit of parameters."""
        async with writing():
            for first in range(0, len(sessions), 1000):
                await AgentSession.insert(*sessions[first : first + 1000]).on_conflict(
                    target=AgentSession.session_id, action="DO UPDATE", values=[AgentSession.last_active_at]
                )
        return len(sessions)

    async def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if await self.device(device_id) is None:
            secret = f"sha256$of-{device_id}"
            device = Device(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now())
            async with writing():
                await Device.insert(device)
            approved = {Device.approved: 1, Device.approved_at: self.now()}
            async with writing():
                await Device.update(approved).where(Device.id == device_id)

    async def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        async with writing():
            await self._see(event["device"])
            if await Agent.objects().get(Agent.id == agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                await Agent.insert(Agent(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now))
            if await AgentSession.objects().get(AgentSession.session_id == session_id) is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = await AgentSession.exists().where(AgentSession.route_key == route)
                row = (session_id, agent_id, sender, channel, now, now, None if taken else route)
                await AgentSession.insert(_session(row))
            older = (AgentSession.session_id == session_id) & (AgentSession.last_active_at < now)
            await AgentSession.update({AgentSession.last_active_at: now}).where(older)
            if await self.find_key(event["device"], METHOD, event["key"]) is not None:
                return True
            await self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    async def sweep(self) -> int:
        """Delete dead rows; the keys and nonces of the trace are unique by themselves."""
        now, total = self.now(), 0
        for table, column, before in ((Nonce, Nonce.nonce, now - GRACE), (IdempotencyKey, IdempotencyKey.key, now)):
            expires: Any = table.expires_at
            count = BATCH
            while count == BATCH:
                async with writing():
                    dead: Any = table.select(column).where(expires <= before).order_by(expires).limit(BATCH)
                    values = await dead.output(as_list=True)
                    if values:
                        await table.delete().where(column.is_in(values) & (expires <= before))
                    count = len(values)
                total += count
        return total

    async def close(self) -> None:
        """Nothing is kept open."""


def _session(row: Sequence[Any]) -> AgentSession:
    return AgentSession(**dict(zip(SESSION_COLUMNS, row, strict=True)))
