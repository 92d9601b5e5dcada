"""Mapped classes: SQLAlchemy's ORM, and SQLModel as in its tutorial.

Both find a row, change or add an object, and commit. SQLModel's tutorial refreshes the object after the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlmodel
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.benchmarks.contender import DAY, METHOD, RESULT, SECRET_HASH, Clock, Event
from tests.benchmarks.contenders.sqlalchemy_core import make_engine


# The columns come from the database.
class _Base(DeferredReflection, DeclarativeBase):
    __abstract__ = True


class _Device(_Base):
    __tablename__ = "devices"

    # SQLAlchemy reserves the name `metadata`.
    metadata_: Mapped[str | None] = mapped_column("metadata")


class _Agent(_Base):
    __tablename__ = "agents"


class _Session(_Base):
    __tablename__ = "sessions"


class _Nonce(_Base):
    __tablename__ = "nonces"


class _Key(_Base):
    __tablename__ = "idempotency_keys"


class SQLAlchemyORM:
    """Mapped classes of SQLAlchemy, and a Session for each call."""

    Device: Any = _Device
    Agent: Any = _Agent
    AgentSession: Any = _Session
    Nonce: Any = _Nonce
    Key: Any = _Key

    def __init__(self, path: Path, durability: str, clock: Clock) -> None:
        self.clock = clock
        self.engine = make_engine(path, durability)
        _Base.prepare(self.engine)

    def session(self) -> Any:
        """Return a new Session."""
        return Session(self.engine)

    def statement(self, model: Any) -> Any:
        """Return a SELECT of a model."""
        return sqlalchemy.select(model)

    def all(self, session: Any, statement: Any) -> Any:
        """Run a SELECT."""
        return session.scalars(statement)

    def save(self, session: Any, row: Any) -> None:
        """Add an object, and commit."""
        session.add(row)
        session.commit()

    def device(self, device_id: str) -> Any:
        with self.session() as session:
            return session.get(self.Device, device_id)

    def find_key(self, device_id: str, key: str) -> Any:
        with self.session() as session:
            return self._find_key(session, device_id, key)

    def _find_key(self, session: Any, device_id: str, key: str) -> Any:
        row = self.Key
        statement = self.statement(row).where(row.device_id == device_id, row.method == METHOD, row.key == key)
        return self.all(session, statement.where(row.expires_at > self.clock.ms)).first()

    def sessions(self, agent_id: str, limit: int) -> Any:
        row = self.AgentSession
        statement = self.statement(row).where(row.agent_id == agent_id)
        with self.session() as session:
            order = row.last_active_at.desc(), row.session_id.desc()
            return self.all(session, statement.order_by(*order).limit(limit)).all()

    def seen(self, device_id: str) -> bool:
        with self.session() as session:
            device = session.get(self.Device, device_id)
            if device is None:
                return False
            device.last_seen_at = self.clock.ms
            self.save(session, device)
            return True

    def consume(self, device_id: str, nonce: str) -> bool:
        now = self.clock.ms
        with self.session() as session:
            if session.get(self.Nonce, (device_id, nonce)) is not None:
                return False
            self.save(session, self.Nonce(device_id=device_id, nonce=nonce, created_at=now, expires_at=now + DAY))
            return True

    def _key(self, device_id: str, key: str) -> Any:
        scope = {"device_id": device_id, "method": METHOD, "key": key}
        now = self.clock.ms
        return self.Key(**scope, result=json.dumps(RESULT), created_at=now, expires_at=now + DAY)

    def insert_key(self, device_id: str, key: str) -> bool:
        with self.session() as session:
            if session.get(self.Key, (device_id, METHOD, key)) is not None:
                return False
            self.save(session, self._key(device_id, key))
            return True

    def answer(self, event: Event) -> bool:
        now, device_id, agent_id, session_id = self.clock.ms, event["device"], event["agent"], event["session"]
        with self.session() as session:
            device = session.get(self.Device, device_id)
            if device is None:
                device = self.Device(
                    id=device_id, role="client", shared_secret_hash=SECRET_HASH, approved=1, paired_at=now
                )
                session.add(device)
            device.last_seen_at = now
            if session.get(self.Agent, agent_id) is None:
                session.add(self.Agent(id=agent_id, name=agent_id, workspace_path="/srv/agent", created_at=now))
            row = session.get(self.AgentSession, session_id)
            if row is None:
                route = {"agent_id": agent_id, "sender_id": event["sender"], "channel_id": event["channel"]}
                row = self.AgentSession(session_id=session_id, **route, created_at=now, last_active_at=now)
                session.add(row)
            row.last_active_at = now
            retry = self._find_key(session, device_id, event["key"]) is not None
            if not retry:
                session.merge(self._key(device_id, event["key"]))
            session.commit()
            return retry

    def close(self) -> None:
        self.engine.dispose()


# A separate registry: homeagent, and a program that runs the tests, may have classes of the same names.
class _Model(sqlmodel.SQLModel, registry=sqlalchemy.orm.registry(metadata=sqlalchemy.MetaData())):
    pass


class _ModelDevice(_Model, table=True):
    __tablename__ = "devices"

    id: str = sqlmodel.Field(primary_key=True)
    role: str
    shared_secret_hash: str
    approved: int
    paired_at: int
    last_seen_at: int | None = None
    metadata_: str | None = sqlmodel.Field(default=None, sa_column_kwargs={"name": "metadata"})


class _ModelAgent(_Model, table=True):
    __tablename__ = "agents"

    id: str = sqlmodel.Field(primary_key=True)
    name: str
    workspace_path: str
    created_at: int
    config: str | None = None


class _ModelSession(_Model, table=True):
    __tablename__ = "sessions"

    session_id: str = sqlmodel.Field(primary_key=True)
    agent_id: str = sqlmodel.Field(foreign_key="agents.id")
    sender_id: str | None = None
    channel_id: str | None = None
    created_at: int
    last_active_at: int


class _ModelNonce(_Model, table=True):
    __tablename__ = "nonces"

    device_id: str = sqlmodel.Field(primary_key=True)
    nonce: str = sqlmodel.Field(primary_key=True)
    created_at: int
    expires_at: int


class _ModelKey(_Model, table=True):
    __tablename__ = "idempotency_keys"

    device_id: str = sqlmodel.Field(primary_key=True)
    method: str = sqlmodel.Field(primary_key=True)
    key: str = sqlmodel.Field(primary_key=True)
    result: str
    created_at: int
    expires_at: int


class SQLModelTutorial(SQLAlchemyORM):
    """Table models of SQLModel: `exec`, `add`, `commit`, `refresh`."""

    Device = _ModelDevice
    Agent = _ModelAgent
    AgentSession = _ModelSession
    Nonce = _ModelNonce
    Key = _ModelKey

    def session(self) -> Any:
        return sqlmodel.Session(self.engine)

    def statement(self, model: Any) -> Any:
        return sqlmodel.select(model)

    def all(self, session: Any, statement: Any) -> Any:
        return session.exec(statement)

    def save(self, session: Any, row: Any) -> None:
        """Add an object, commit, and refresh it."""
        session.add(row)
        session.commit()
        session.refresh(row)
