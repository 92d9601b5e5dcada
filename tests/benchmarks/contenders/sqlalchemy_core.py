"""SQLAlchemy Core: tables, statements that are built once, and a pooled connection for each call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, bindparam, create_engine, event, select, update
from sqlalchemy.dialects.sqlite import insert

from tests.benchmarks.contender import DAY, METHOD, RESULT, SECRET_HASH, Clock, Event
from tests.benchmarks.contenders.by_hand import pragmas


def make_engine(path: Path, durability: str) -> Engine:
    """Return an engine whose connections have the pragmas of all contenders."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: object) -> None:
        for pragma in pragmas(durability):
            connection.execute(pragma)

    return engine


class SQLAlchemyCore:
    """Statements, without the ORM."""

    def __init__(self, path: Path, durability: str, clock: Clock) -> None:
        self.clock = clock
        self.engine = make_engine(path, durability)
        metadata = MetaData()
        metadata.reflect(self.engine)
        devices, agents, sessions, nonces, keys = (
            metadata.tables[name] for name in ("devices", "agents", "sessions", "nonces", "idempotency_keys")
        )
        self.find_device = select(devices).where(devices.c.id == bindparam("device"))
        self.find_live_key = select(keys).where(
            keys.c.device_id == bindparam("device"),
            keys.c.method == METHOD,
            keys.c.key == bindparam("its_key"),
            keys.c.expires_at > bindparam("now"),
        )
        self.list_sessions = (
            select(sessions)
            .where(sessions.c.agent_id == bindparam("agent"))
            .order_by(sessions.c.last_active_at.desc(), sessions.c.session_id.desc())
            .limit(bindparam("most"))
        )
        self.set_seen = update(devices).where(devices.c.id == bindparam("device")).values(last_seen_at=bindparam("now"))
        self.store_nonce = insert(nonces).on_conflict_do_nothing()
        self.store_new_key = insert(keys).on_conflict_do_nothing()
        self.store_key = insert(keys).prefix_with("OR REPLACE")
        see = insert(devices)
        self.see_device = see.on_conflict_do_update(
            index_elements=["id"], set_={"last_seen_at": see.excluded.last_seen_at}
        )
        self.create_agent = insert(agents).on_conflict_do_nothing()
        touch = insert(sessions)
        self.touch_session = touch.on_conflict_do_update(
            index_elements=["session_id"], set_={"last_active_at": touch.excluded.last_active_at}
        )

    def device(self, device_id: str) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(self.find_device, {"device": device_id}).first()

    def find_key(self, device_id: str, key: str) -> Any:
        with self.engine.connect() as connection:
            return self._find_key(connection, device_id, key)

    def _find_key(self, connection: Connection, device_id: str, key: str) -> Any:
        parameters = {"device": device_id, "its_key": key, "now": self.clock.ms}
        return connection.execute(self.find_live_key, parameters).first()

    def sessions(self, agent_id: str, limit: int) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(self.list_sessions, {"agent": agent_id, "most": limit}).all()

    def _write(self, statement: Any, parameters: dict[str, Any]) -> bool:
        with self.engine.begin() as connection:
            return connection.execute(statement, parameters).rowcount > 0

    def seen(self, device_id: str) -> bool:
        return self._write(self.set_seen, {"device": device_id, "now": self.clock.ms})

    def consume(self, device_id: str, nonce: str) -> bool:
        now = self.clock.ms
        row = {"device_id": device_id, "nonce": nonce, "created_at": now, "expires_at": now + DAY}
        return self._write(self.store_nonce, row)

    def _key(self, device_id: str, key: str) -> dict[str, Any]:
        now = self.clock.ms
        scope = {"device_id": device_id, "method": METHOD, "key": key}
        return {**scope, "result": json.dumps(RESULT), "created_at": now, "expires_at": now + DAY}

    def insert_key(self, device_id: str, key: str) -> bool:
        return self._write(self.store_new_key, self._key(device_id, key))

    def answer(self, event: Event) -> bool:
        now, device_id, agent_id = self.clock.ms, event["device"], event["agent"]
        device = {"id": device_id, "role": "client", "shared_secret_hash": SECRET_HASH, "approved": 1}
        agent = {"id": agent_id, "name": agent_id, "workspace_path": "/srv/agent", "created_at": now}
        session = {"session_id": event["session"], "agent_id": agent_id, "created_at": now, "last_active_at": now}
        with self.engine.begin() as connection:
            connection.execute(self.see_device, {**device, "paired_at": now, "last_seen_at": now})
            connection.execute(self.create_agent, agent)
            route = {"sender_id": event["sender"], "channel_id": event["channel"]}
            connection.execute(self.touch_session, {**session, **route})
            if self._find_key(connection, device_id, event["key"]) is not None:
                return True
            connection.execute(self.store_key, self._key(device_id, event["key"]))
            return False

    def close(self) -> None:
        self.engine.dispose()
