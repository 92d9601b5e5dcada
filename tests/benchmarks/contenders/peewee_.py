"""peewee: model classes on its SqliteDatabase, one connection kept open, `atomic` for each call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from peewee import SQL, CompositeKey, IntegerField, Model, SqliteDatabase, TextField, Tuple, fn

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, SESSION_COLUMNS, Contender
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["Peewee"]

database = SqliteDatabase(None)


class Base(Model):
    """What the models share."""

    class Meta:
        database = database


class Device(Base):
    """A row of `devices`."""

    id = TextField(primary_key=True)
    role = TextField()
    shared_secret_hash = TextField()
    approved = IntegerField(default=0)
    paired_at = IntegerField()
    last_seen_at = IntegerField(null=True)
    metadata = TextField(null=True)
    approved_at = IntegerField(null=True)
    revoked_at = IntegerField(null=True)
    revoked_reason = TextField(null=True)
    previous_secret_hash = TextField(null=True)
    previous_secret_expires_at = IntegerField(null=True)
    proof_verifier = TextField(null=True)

    class Meta:
        table_name = "devices"


class Agent(Base):
    """A row of `agents`."""

    id = TextField(primary_key=True)
    name = TextField()
    workspace_path = TextField()
    created_at = IntegerField()
    config = TextField(null=True)

    class Meta:
        table_name = "agents"


class AgentSession(Base):
    """A row of `sessions`."""

    session_id = TextField(primary_key=True)
    agent_id = TextField()
    sender_id = TextField(null=True)
    channel_id = TextField(null=True)
    created_at = IntegerField()
    last_active_at = IntegerField()
    route_key = TextField(null=True)

    class Meta:
        table_name = "sessions"


class Nonce(Base):
    """A row of `nonces`."""

    nonce = TextField()
    device_id = TextField()
    created_at = IntegerField()
    expires_at = IntegerField()

    class Meta:
        table_name = "nonces"
        primary_key = CompositeKey("device_id", "nonce")


class IdempotencyKey(Base):
    """A row of `idempotency_keys`."""

    key = TextField()
    method = TextField()
    device_id = TextField()
    result = TextField()
    created_at = IntegerField()
    expires_at = IntegerField()
    state = TextField(default="completed")
    fingerprint = TextField(null=True)
    owner = TextField(null=True)
    attempt = IntegerField(default=1)
    lease_expires_at = IntegerField(null=True)
    downstream_key = TextField(null=True)
    omitted = IntegerField(default=0)

    class Meta:
        table_name = "idempotency_keys"
        primary_key = CompositeKey("device_id", "method", "key")


class Peewee(Contender):
    """Models."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        pragmas = [tuple(pragma.split("=")) for pragma in (*PRAGMAS, f"synchronous={durability}")]
        database.init(target, pragmas=pragmas)
        database.connect()

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("peewee")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make the values of sessions."""
        if work == "index":
            return [([(*row, route_key(*row[1:4])) for row in rows],) for (rows,) in arguments]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        return Device.get_or_none(Device.id == device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        live = (IdempotencyKey.expires_at > self.now()) | (IdempotencyKey.state == "in_progress")
        return IdempotencyKey.get_or_none(self._same(device_id, method, key) & live)

    def _same(self, device_id: str, method: str, key: str) -> Any:
        return (IdempotencyKey.device_id == device_id) & (IdempotencyKey.method == method) & (IdempotencyKey.key == key)

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        order = AgentSession.last_active_at.desc(), AgentSession.session_id.desc()
        return list(AgentSession.select().where(AgentSession.agent_id == agent_id).order_by(*order).limit(limit))

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with database.atomic("IMMEDIATE"):
            return self._see(device_id)

    def _see(self, device_id: str) -> bool:
        now = self.now()
        due = Device.last_seen_at.is_null() | (Device.last_seen_at <= now - GRANULARITY)
        wrote: int = Device.update(last_seen_at=now).where((Device.id == device_id) & due).execute()
        return wrote > 0

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        with database.atomic("IMMEDIATE"):
            insert = Nonce.insert(nonce=nonce, device_id=device_id, created_at=now, expires_at=expires_at)
            wrote: int = (
                insert.on_conflict(
                    conflict_target=[Nonce.device_id, Nonce.nonce],
                    preserve=[Nonce.created_at, Nonce.expires_at],
                    where=Nonce.expires_at <= now,
                )
                .as_rowcount()
                .execute()
            )
        return wrote > 0

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with database.atomic("IMMEDIATE"):
            return self._store(device_id, method, key, result)

    def _store(self, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        insert = IdempotencyKey.insert(
            device_id=device_id,
            method=method,
            key=key,
            result=json.dumps(result),
            created_at=now,
            expires_at=now + DAY,
            **others,
        )
        wrote: int = (
            insert.on_conflict(
                conflict_target=[IdempotencyKey.device_id, IdempotencyKey.method, IdempotencyKey.key],
                preserve=[IdempotencyKey.result, IdempotencyKey.created_at, IdempotencyKey.expires_at],
                update={"state": "completed", "attempt": 1, "omitted": 0, "owner": None, "fingerprint": None, **others},
                where=(IdempotencyKey.expires_at <= now) & (IdempotencyKey.state != "in_progress"),
            )
            .as_rowcount()
            .execute()
        )
        return wrote > 0

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        with database.atomic("IMMEDIATE"):
            if not self._store(device_id, method, key, None, **claimed):
                return False
        with database.atomic("IMMEDIATE"):
            done = {"state": "completed", "result": json.dumps(result), "lease_expires_at": None}
            owned = self._same(device_id, method, key) & (IdempotencyKey.owner == owner)
            wrote: int = IdempotencyKey.update(**done).where(owned).execute()
        return wrote > 0

    def index(self, sessions: Sequence[Any]) -> int:
        """Add sessions, in batches below SQLite's limit of parameters."""
        columns = [getattr(AgentSession, name) for name in SESSION_COLUMNS]
        later = fn.MAX(AgentSession.last_active_at, SQL("excluded.last_active_at"))
        with database.atomic("IMMEDIATE"):
            for first in range(0, len(sessions), 1000):
                AgentSession.insert_many(sessions[first : first + 1000], fields=columns).on_conflict(
                    conflict_target=[AgentSession.session_id], update={AgentSession.last_active_at: later}
                ).execute()
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if self.device(device_id) is None:
            secret = f"sha256$of-{device_id}"
            with database.atomic("IMMEDIATE"):
                device = Device.create(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now())
            with database.atomic("IMMEDIATE"):
                device.approved, device.approved_at = 1, self.now()
                device.save()

    def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        with database.atomic("IMMEDIATE"):
            self._see(event["device"])
            if Agent.get_or_none(Agent.id == agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                Agent.create(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now)
            if AgentSession.get_or_none(AgentSession.session_id == session_id) is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = AgentSession.select().where(AgentSession.route_key == route).exists()
                row = (session_id, agent_id, sender, channel, now, now, None if taken else route)
                AgentSession.create(**dict(zip(SESSION_COLUMNS, row, strict=True)))
            AgentSession.update(last_active_at=now).where(
                (AgentSession.session_id == session_id) & (AgentSession.last_active_at < now)
            ).execute()
            if self.find_key(event["device"], METHOD, event["key"]) is not None:
                return True
            self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for model, columns, before in (
            (Nonce, (Nonce.device_id, Nonce.nonce), now - GRACE),
            (IdempotencyKey, (IdempotencyKey.device_id, IdempotencyKey.method, IdempotencyKey.key), now),
        ):
            count = BATCH
            while count == BATCH:
                with database.atomic("IMMEDIATE"):
                    dead = model.select(*columns).where(model.expires_at <= before)
                    oldest = dead.order_by(model.expires_at).limit(BATCH)
                    count = model.delete().where(Tuple(*columns).in_(oldest)).execute()
                total += count
        return total

    def close(self) -> None:
        """Close the connection."""
        database.close()
