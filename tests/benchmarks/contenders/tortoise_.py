"""Tortoise: asynchronous models, and `in_transaction` for each write. It has no composite primary keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tortoise import Model, Tortoise, fields
from tortoise.expressions import Q
from tortoise.transactions import in_transaction

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, SESSION_COLUMNS, AsyncContender
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["TortoiseModels"]


class Device(Model):
    """A row of `devices`."""

    id = fields.CharField(128, primary_key=True)
    role = fields.TextField()
    shared_secret_hash = fields.TextField()
    approved = fields.IntField(default=0)
    paired_at = fields.BigIntField()
    last_seen_at = fields.BigIntField(null=True)
    metadata = fields.TextField(null=True)
    approved_at = fields.BigIntField(null=True)
    revoked_at = fields.BigIntField(null=True)
    revoked_reason = fields.TextField(null=True)
    previous_secret_hash = fields.TextField(null=True)
    previous_secret_expires_at = fields.BigIntField(null=True)
    proof_verifier = fields.TextField(null=True)

    class Meta:
        table = "devices"


class Agent(Model):
    """A row of `agents`."""

    id = fields.CharField(128, primary_key=True)
    name = fields.TextField()
    workspace_path = fields.TextField()
    created_at = fields.BigIntField()
    config = fields.TextField(null=True)

    class Meta:
        table = "agents"


class AgentSession(Model):
    """A row of `sessions`."""

    session_id = fields.CharField(128, primary_key=True)
    agent_id = fields.TextField()
    sender_id = fields.TextField(null=True)
    channel_id = fields.TextField(null=True)
    created_at = fields.BigIntField()
    last_active_at = fields.BigIntField()
    route_key = fields.TextField(null=True)

    class Meta:
        table = "sessions"


class Nonce(Model):
    """A row of `nonces`."""

    nonce = fields.CharField(256, primary_key=True)
    device_id = fields.TextField()
    created_at = fields.BigIntField()
    expires_at = fields.BigIntField()

    class Meta:
        table = "nonces"


class IdempotencyKey(Model):
    """A row of `idempotency_keys`."""

    key = fields.CharField(256, primary_key=True)
    method = fields.TextField()
    device_id = fields.TextField()
    result = fields.TextField()
    created_at = fields.BigIntField()
    expires_at = fields.BigIntField()
    state = fields.TextField(default="completed")
    fingerprint = fields.TextField(null=True)
    owner = fields.TextField(null=True)
    attempt = fields.IntField(default=1)
    lease_expires_at = fields.BigIntField(null=True)
    downstream_key = fields.TextField(null=True)
    omitted = fields.IntField(default=0)

    class Meta:
        table = "idempotency_keys"


class TortoiseModels(AsyncContender):
    """Models."""

    async def open(self) -> None:
        """Connect."""
        pragmas = "&".join((*PRAGMAS, f"synchronous={self.durability}"))
        await Tortoise.init(
            db_url=f"sqlite://{self.target}?{pragmas}",
            modules={"models": [__name__]},
            # Each call is a task of its own, with a context of its own.
            _enable_global_fallback=True,
        )

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("tortoise-orm")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make models of sessions."""
        if work == "index":
            return [([_session((*row, route_key(*row[1:4]))) for row in rows],) for (rows,) in arguments]
        return arguments

    async def device(self, device_id: str) -> Any:
        """Find a device."""
        return await Device.get_or_none(id=device_id)

    async def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        live = Q(expires_at__gt=self.now()) | Q(state="in_progress")
        return await IdempotencyKey.filter(live, device_id=device_id, method=method, key=key).first()

    async def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        return await AgentSession.filter(agent_id=agent_id).order_by("-last_active_at", "-session_id").limit(limit)

    async def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        async with in_transaction():
            return await self._see(device_id)

    async def _see(self, device_id: str) -> bool:
        now = self.now()
        due = Q(last_seen_at__isnull=True) | Q(last_seen_at__lte=now - GRANULARITY)
        wrote: int = await Device.filter(due, id=device_id).update(last_seen_at=now)
        return wrote > 0

    async def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        async with in_transaction():
            row = await Nonce.get_or_none(device_id=device_id, nonce=nonce)
            if row is None:
                await Nonce.create(device_id=device_id, nonce=nonce, created_at=now, expires_at=expires_at)
                return True
            if row.expires_at > now:
                return False
            values = {"created_at": now, "expires_at": expires_at}
            await Nonce.filter(device_id=device_id, nonce=nonce).update(**values)
        return True

    async def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        async with in_transaction():
            return await self._store(device_id, method, key, result)

    async def _store(self, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        scope = {"device_id": device_id, "method": method, "key": key}
        row = await IdempotencyKey.get_or_none(**scope)
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return False
            await IdempotencyKey.filter(**scope).delete()
        values = {"result": json.dumps(result), "created_at": now, "expires_at": now + DAY, **others}
        await IdempotencyKey.create(**scope, **values)
        return True

    async def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        async with in_transaction():
            if not await self._store(device_id, method, key, None, **claimed):
                return False
        async with in_transaction():
            owned = IdempotencyKey.filter(device_id=device_id, method=method, key=key, owner=owner)
            wrote: int = await owned.update(state="completed", result=json.dumps(result), lease_expires_at=None)
        return wrote > 0

    async def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions, or move on those that exist."""
        async with in_transaction():
            await AgentSession.bulk_create(sessions, on_conflict=["session_id"], update_fields=["last_active_at"])
        return len(sessions)

    async def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if await self.device(device_id) is None:
            secret = f"sha256$of-{device_id}"
            async with in_transaction():
                await Device.create(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now())
            async with in_transaction():
                await Device.filter(id=device_id).update(approved=1, approved_at=self.now())

    async def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        async with in_transaction():
            await self._see(event["device"])
            if await Agent.get_or_none(id=agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                await Agent.create(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now)
            if await AgentSession.get_or_none(session_id=session_id) is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = await AgentSession.filter(route_key=route).exists()
                row = (session_id, agent_id, sender, channel, now, now, None if taken else route)
                await _session(row).save(force_create=True)
            await AgentSession.filter(session_id=session_id, last_active_at__lt=now).update(last_active_at=now)
            if await self.find_key(event["device"], METHOD, event["key"]) is not None:
                return True
            await self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    async def sweep(self) -> int:
        """Delete dead rows; the keys and nonces of the trace are unique by themselves."""
        now, total = self.now(), 0
        for model, name, before in ((Nonce, "nonce", now - GRACE), (IdempotencyKey, "key", now)):
            count = BATCH
            while count == BATCH:
                async with in_transaction():
                    dead: Any = model.filter(expires_at__lte=before).order_by("expires_at").limit(BATCH)
                    rows = await dead.values_list("device_id", name)
                    for device_id, value in rows:
                        await model.filter(**{"device_id": device_id, name: value}).delete()
                    count = len(rows)
                total += count
        return total

    async def close(self) -> None:
        """Close the connection."""
        await Tortoise.close_connections()


def _session(row: Sequence[Any]) -> AgentSession:
    return AgentSession(**dict(zip(SESSION_COLUMNS, row, strict=True)))
