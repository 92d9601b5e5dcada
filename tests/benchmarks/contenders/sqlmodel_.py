"""SQLModel as its tutorial does it: table models, an engine, a Session for each request, add, commit, refresh."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from secrets import token_hex
from typing import Any

from sqlmodel import Field, Session, SQLModel, or_, select

from tests.benchmarks.contender import BATCH, FINGERPRINT, GRACE, GRANULARITY, LEASE, Contender
from tests.benchmarks.contenders.handwritten import route_key
from tests.benchmarks.contenders.sqlalchemy_core import make_engine
from tests.benchmarks.data import DAY, METHOD

__all__ = ["SQLModelTutorial"]


class Device(SQLModel, table=True):
    """A row of `devices`."""

    __tablename__ = "devices"

    id: str = Field(primary_key=True)
    role: str
    shared_secret_hash: str
    approved: int = 0
    paired_at: int
    last_seen_at: int | None = None
    metadata_: str | None = Field(default=None, sa_column_kwargs={"name": "metadata"})
    approved_at: int | None = None
    revoked_at: int | None = None
    revoked_reason: str | None = None
    previous_secret_hash: str | None = None
    previous_secret_expires_at: int | None = None
    proof_verifier: str | None = None


class Agent(SQLModel, table=True):
    """A row of `agents`."""

    __tablename__ = "agents"

    id: str = Field(primary_key=True)
    name: str
    workspace_path: str
    created_at: int
    config: str | None = None


class AgentSession(SQLModel, table=True):
    """A row of `sessions`."""

    __tablename__ = "sessions"

    session_id: str = Field(primary_key=True)
    agent_id: str = Field(foreign_key="agents.id")
    sender_id: str | None = None
    channel_id: str | None = None
    created_at: int
    last_active_at: int
    route_key: str | None = None


class Nonce(SQLModel, table=True):
    """A row of `nonces`."""

    __tablename__ = "nonces"

    nonce: str = Field(primary_key=True)
    device_id: str = Field(primary_key=True)
    created_at: int
    expires_at: int


class IdempotencyKey(SQLModel, table=True):
    """A row of `idempotency_keys`."""

    __tablename__ = "idempotency_keys"

    key: str = Field(primary_key=True)
    method: str = Field(primary_key=True)
    device_id: str = Field(primary_key=True)
    result: str = "null"
    created_at: int
    expires_at: int
    state: str = "completed"
    fingerprint: str | None = None
    owner: str | None = None
    attempt: int = 1
    lease_expires_at: int | None = None
    downstream_key: str | None = None
    omitted: int = 0


class SQLModelTutorial(Contender):
    """The tutorial's way."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        self.engine = make_engine(target, durability)

    @classmethod
    def describe(cls) -> str:
        """Return the versions."""
        return f"{version('sqlmodel')}, SQLAlchemy {version('sqlalchemy')}"

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make models of sessions."""
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
            return session.exec(self._live_key(device_id, method, key)).first()

    def _live_key(self, device_id: str, method: str, key: str) -> Any:
        return select(IdempotencyKey).where(
            IdempotencyKey.device_id == device_id,
            IdempotencyKey.method == method,
            IdempotencyKey.key == key,
            or_(IdempotencyKey.expires_at > self.now(), IdempotencyKey.state == "in_progress"),
        )

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        active: Any = AgentSession.last_active_at
        identity: Any = AgentSession.session_id
        with Session(self.engine) as session:
            statement = select(AgentSession).where(AgentSession.agent_id == agent_id)
            return session.exec(statement.order_by(active.desc(), identity.desc()).limit(limit)).all()

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with Session(self.engine) as session:
            seen = self._see(session, device_id)
            session.commit()
            return seen

    def _see(self, session: Session, device_id: str) -> bool:
        now = self.now()
        device = session.get(Device, device_id)
        if device is None or (device.last_seen_at is not None and device.last_seen_at > now - GRANULARITY):
            return False
        device.last_seen_at = now
        session.add(device)
        return True

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        with Session(self.engine) as session:
            now = self.now()
            row = session.get(Nonce, (nonce, device_id))
            if row is not None:
                if row.expires_at > now:
                    return False
                row.created_at, row.expires_at = now, expires_at
            else:
                row = Nonce(nonce=nonce, device_id=device_id, created_at=now, expires_at=expires_at)
            session.add(row)
            session.commit()
            session.refresh(row)
            return True

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with Session(self.engine) as session:
            row = self._store(session, device_id, method, key, result)
            if row is None:
                return False
            session.commit()
            session.refresh(row)
            return True

    def _store(self, session: Session, device_id: str, method: str, key: str, result: Any) -> IdempotencyKey | None:
        now = self.now()
        row = session.get(IdempotencyKey, (key, method, device_id))
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return None
            session.delete(row)
            session.flush()
        row = IdempotencyKey(
            key=key,
            method=method,
            device_id=device_id,
            result=json.dumps(result),
            created_at=now,
            expires_at=now + DAY,
        )
        session.add(row)
        return row

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        with Session(self.engine) as session:
            row = self._store(session, device_id, method, key, None)
            if row is None:
                return False
            owner = row.owner = token_hex(16)
            row.state, row.fingerprint, row.downstream_key = "in_progress", FINGERPRINT, token_hex(16)
            row.lease_expires_at = row.created_at + LEASE
            session.commit()
        with Session(self.engine) as session:
            claimed = session.get(IdempotencyKey, (key, method, device_id))
            if claimed is None or claimed.owner != owner:
                return False
            claimed.state, claimed.result = "completed", json.dumps(result)
            claimed.owner = claimed.lease_expires_at = None
            session.add(claimed)
            session.commit()
            session.refresh(claimed)
        return True

    def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions; the tutorial knows no upsert, and these are new."""
        with Session(self.engine) as session:
            session.add_all(sessions)
            session.commit()
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        with Session(self.engine) as session:
            device = session.get(Device, device_id)
            if device is None:
                device = Device(
                    id=device_id, role="client", shared_secret_hash=f"sha256$of-{device_id}", paired_at=self.now()
                )
                session.add(device)
                session.commit()
                session.refresh(device)
                device.approved, device.approved_at = 1, self.now()
                session.add(device)
                session.commit()

    def answer(self, event: Any) -> bool:
        """Take a message."""
        agent_id, session_id, now = event["agent"], event["session"], self.now()
        with Session(self.engine) as session:
            self._see(session, event["device"])
            if session.get(Agent, agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                session.add(Agent(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now))
                session.flush()
            row = session.get(AgentSession, session_id)
            if row is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                if session.exec(select(AgentSession).where(AgentSession.route_key == route)).first() is not None:
                    route = ""
                row = _session((session_id, agent_id, sender, channel, now, now), route or None)
            row.last_active_at = max(now, row.last_active_at)
            session.add(row)
            if session.exec(self._live_key(event["device"], METHOD, event["key"])).first() is not None:
                session.commit()
                return True
            result = {"session": session_id, "accepted_at": now}
            self._store(session, event["device"], METHOD, event["key"], result)
            session.commit()
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for model, before in ((Nonce, now - GRACE), (IdempotencyKey, now)):
            expires: Any = model.expires_at
            count = BATCH
            while count == BATCH:
                with Session(self.engine) as session:
                    rows = session.exec(select(model).where(expires <= before).order_by(expires).limit(BATCH)).all()
                    for row in rows:
                        session.delete(row)
                    session.commit()
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
