"""SQLAlchemy's ORM: mapped classes, a Session for each call, objects added and changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sqlalchemy import ForeignKey, or_, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, Contender
from tests.benchmarks.contenders.handwritten import route_key
from tests.benchmarks.contenders.sqlalchemy_core import make_engine
from tests.benchmarks.data import DAY, METHOD

__all__ = ["SQLAlchemyORM"]


class Base(DeclarativeBase):
    """The base of the mapped classes."""


class Device(Base):
    """A row of `devices`."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    shared_secret_hash: Mapped[str]
    approved: Mapped[int] = mapped_column(default=0)
    paired_at: Mapped[int]
    last_seen_at: Mapped[int | None]
    metadata_: Mapped[str | None] = mapped_column("metadata")
    approved_at: Mapped[int | None]
    revoked_at: Mapped[int | None]
    revoked_reason: Mapped[str | None]
    previous_secret_hash: Mapped[str | None]
    previous_secret_expires_at: Mapped[int | None]
    proof_verifier: Mapped[str | None]


class Agent(Base):
    """A row of `agents`."""

    __tablename__ = "agents"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    workspace_path: Mapped[str]
    created_at: Mapped[int]
    config: Mapped[str | None]


class AgentSession(Base):
    """A row of `sessions`."""

    __tablename__ = "sessions"

    session_id: Mapped[str] = mapped_column(primary_key=True)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"))
    sender_id: Mapped[str | None]
    channel_id: Mapped[str | None]
    created_at: Mapped[int]
    last_active_at: Mapped[int]
    route_key: Mapped[str | None]


class Nonce(Base):
    """A row of `nonces`."""

    __tablename__ = "nonces"

    nonce: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[int]
    expires_at: Mapped[int]


class IdempotencyKey(Base):
    """A row of `idempotency_keys`."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    method: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(primary_key=True)
    result: Mapped[str]
    created_at: Mapped[int]
    expires_at: Mapped[int]
    state: Mapped[str] = mapped_column(default="completed")
    fingerprint: Mapped[str | None]
    owner: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(default=1)
    lease_expires_at: Mapped[int | None]
    downstream_key: Mapped[str | None]
    omitted: Mapped[int] = mapped_column(default=0)


class SQLAlchemyORM(Contender):
    """Mapped classes."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        self.engine = make_engine(target, durability)

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("sqlalchemy")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make objects of sessions."""
        if work == "index":
            return [([_session(row) for row in rows],) for (rows,) in arguments]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        with Session(self.engine) as session:
            return session.get(Device, device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        with Session(self.engine) as session:
            return session.scalars(self._live_key(device_id, method, key)).first()

    def _live_key(self, device_id: str, method: str, key: str) -> Any:
        return select(IdempotencyKey).where(
            IdempotencyKey.device_id == device_id,
            IdempotencyKey.method == method,
            IdempotencyKey.key == key,
            or_(IdempotencyKey.expires_at > self.now(), IdempotencyKey.state == "in_progress"),
        )

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        with Session(self.engine) as session:
            statement = select(AgentSession).where(AgentSession.agent_id == agent_id)
            order = AgentSession.last_active_at.desc(), AgentSession.session_id.desc()
            return session.scalars(statement.order_by(*order).limit(limit)).all()

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with Session(self.engine) as session, session.begin():
            return self._see(session, device_id)

    def _see(self, session: Session, device_id: str) -> bool:
        now = self.now()
        device = session.get(Device, device_id)
        if device is None or (device.last_seen_at is not None and device.last_seen_at > now - GRANULARITY):
            return False
        device.last_seen_at = now
        return True

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        with Session(self.engine) as session, session.begin():
            row = session.get(Nonce, (nonce, device_id))
            if row is None:
                session.add(Nonce(nonce=nonce, device_id=device_id, created_at=now, expires_at=expires_at))
            elif row.expires_at > now:
                return False
            else:
                row.created_at, row.expires_at = now, expires_at
        return True

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with Session(self.engine) as session, session.begin():
            return self._store(session, device_id, method, key, result)

    def _store(self, session: Session, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        row = session.get(IdempotencyKey, (key, method, device_id))
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return False
            session.delete(row)
            session.flush()
        scope = {"key": key, "method": method, "device_id": device_id}
        session.add(IdempotencyKey(**scope, result=json.dumps(result), created_at=now, expires_at=now + DAY, **others))
        return True

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        with Session(self.engine) as session, session.begin():
            if not self._store(session, device_id, method, key, None, **claimed):
                return False
        with Session(self.engine) as session, session.begin():
            row = session.get(IdempotencyKey, (key, method, device_id))
            if row is None or row.owner != owner:
                return False
            row.state, row.result, row.lease_expires_at = "completed", json.dumps(result), None
        return True

    def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions, which are new."""
        with Session(self.engine) as session, session.begin():
            session.add_all(sessions)
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        with Session(self.engine) as session, session.begin():
            if session.get(Device, device_id) is not None:
                return
            secret = f"sha256$of-{device_id}"
            session.add(Device(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now()))
        with Session(self.engine) as session, session.begin():
            device = session.get_one(Device, device_id)
            device.approved, device.approved_at = 1, self.now()

    def answer(self, event: Any) -> bool:
        """Take a message."""
        agent_id, session_id, now = event["agent"], event["session"], self.now()
        with Session(self.engine) as session, session.begin():
            self._see(session, event["device"])
            if session.get(Agent, agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                session.add(Agent(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now))
                session.flush()
            row = session.get(AgentSession, session_id)
            if row is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = session.scalars(select(AgentSession).where(AgentSession.route_key == route)).first()
                row = _session((session_id, agent_id, sender, channel, now, now), None if taken else route)
                session.add(row)
            row.last_active_at = max(now, row.last_active_at)
            if session.scalars(self._live_key(event["device"], METHOD, event["key"])).first() is not None:
                return True
            result = {"session": session_id, "accepted_at": now}
            self._store(session, event["device"], METHOD, event["key"], result)
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for model, before in ((Nonce, now - GRACE), (IdempotencyKey, now)):
            kind: Any = model
            count = BATCH
            while count == BATCH:
                with Session(self.engine) as session, session.begin():
                    dead = select(kind).where(kind.expires_at <= before).order_by(kind.expires_at).limit(BATCH)
                    rows = session.scalars(dead).all()
                    for row in rows:
                        session.delete(row)
                    count = len(rows)
                total += count
        return total

    def close(self) -> None:
        """Close the pool."""
        self.engine.dispose()


def _session(row: Sequence[Any], route: str | None = None) -> AgentSession:
    session_id, agent_id, sender_id, channel_id, created_at, last_active_at = row
    return AgentSession(
        session_id=session_id,
        agent_id=agent_id,
        sender_id=sender_id,
        channel_id=channel_id,
        created_at=created_at,
        last_active_at=last_active_at,
        route_key=route,
    )
