"""SQLAlchemy Core: tables, statements made once and cached by SQLAlchemy, a pooled connection for each call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    case,
    create_engine,
    delete,
    event,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.sqlite import insert

from tests.benchmarks.contender import (
    BATCH,
    DEVICE_COLUMNS,
    GRACE,
    GRANULARITY,
    KEY_COLUMNS,
    SESSION_COLUMNS,
    Contender,
)
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["SQLAlchemyCore", "make_engine"]

NUMBERS = {"approved", "attempt", "omitted"}
KEYS = {
    "devices": {"id"},
    "agents": {"id"},
    "sessions": {"session_id"},
    "nonces": {"nonce", "device_id"},
    "idempotency_keys": {"device_id", "method", "key"},
}


def _table(name: str, columns: Sequence[str]) -> Table:
    kinds = {column: Integer if column in NUMBERS or column.endswith("_at") else Text for column in columns}
    return Table(
        name, MetaData(), *(Column(column, kind, primary_key=column in KEYS[name]) for column, kind in kinds.items())
    )


devices = _table("devices", DEVICE_COLUMNS)
agents = _table("agents", ("id", "name", "workspace_path", "created_at", "config"))
sessions = _table("sessions", SESSION_COLUMNS)
nonces = _table("nonces", ("nonce", "device_id", "created_at", "expires_at"))
keys = _table("idempotency_keys", KEY_COLUMNS)

SAME_KEY = and_(
    keys.c.device_id == bindparam("device"),
    keys.c.method == bindparam("its_method"),
    keys.c.key == bindparam("its_key"),
)
DEVICE = select(devices).where(devices.c.id == bindparam("device"))
SEEN = (
    update(devices)
    .where(devices.c.id == bindparam("device"))
    .where(or_(devices.c.last_seen_at.is_(None), devices.c.last_seen_at <= bindparam("before")))
    .values(last_seen_at=bindparam("now"))
)
CONSUME = insert(nonces)
CONSUME = CONSUME.on_conflict_do_update(
    index_elements=["device_id", "nonce"],
    set_={"created_at": CONSUME.excluded.created_at, "expires_at": CONSUME.excluded.expires_at},
    where=nonces.c.expires_at <= bindparam("now"),
)
FIND_KEY = select(keys).where(SAME_KEY, or_(keys.c.expires_at > bindparam("now"), keys.c.state == "in_progress"))
STORE_KEY = insert(keys)
STORE_KEY = STORE_KEY.on_conflict_do_update(
    index_elements=["device_id", "method", "key"],
    set_={name: STORE_KEY.excluded[name] for name in KEY_COLUMNS if name not in KEYS["idempotency_keys"]},
    where=and_(keys.c.expires_at <= bindparam("now"), keys.c.state != "in_progress"),
)
COMPLETE = (
    update(keys)
    .where(SAME_KEY, keys.c.state == "in_progress", keys.c.owner == bindparam("its_owner"))
    .values(state="completed", result=bindparam("outcome"), expires_at=bindparam("until"), lease_expires_at=None)
)
SESSIONS = (
    select(sessions)
    .where(sessions.c.agent_id == bindparam("agent"))
    .order_by(sessions.c.last_active_at.desc(), sessions.c.session_id.desc())
    .limit(bindparam("most"))
)
SESSION = select(sessions).where(sessions.c.session_id == bindparam("session"))
TAKEN = select(sessions.c.session_id).where(sessions.c.route_key == bindparam("route")).exists()
INDEX = insert(sessions).values(
    {
        **{name: bindparam(name) for name in SESSION_COLUMNS[:-1]},
        "route_key": case((TAKEN, null()), else_=bindparam("route", type_=Text)),
    }
)
INDEX = INDEX.on_conflict_do_update(
    index_elements=["session_id"],
    set_={
        "last_active_at": case(
            (INDEX.excluded.last_active_at > sessions.c.last_active_at, INDEX.excluded.last_active_at),
            else_=sessions.c.last_active_at,
        )
    },
)
CREATE_SESSION = insert(sessions).on_conflict_do_nothing()
TOUCH = (
    update(sessions)
    .where(sessions.c.session_id == bindparam("session"), sessions.c.last_active_at < bindparam("now"))
    .values(last_active_at=bindparam("now"))
)
AGENT = select(agents).where(agents.c.id == bindparam("agent"))
CREATE_AGENT = insert(agents).on_conflict_do_nothing()
SWEEP_NONCES = delete(nonces).where(
    tuple_(nonces.c.device_id, nonces.c.nonce).in_(
        select(nonces.c.device_id, nonces.c.nonce)
        .where(nonces.c.expires_at <= bindparam("before"))
        .order_by(nonces.c.expires_at)
        .limit(BATCH)
    )
)
SWEEP_KEYS = delete(keys).where(
    tuple_(keys.c.device_id, keys.c.method, keys.c.key).in_(
        select(keys.c.device_id, keys.c.method, keys.c.key)
        .where(keys.c.expires_at <= bindparam("before"), keys.c.state != "in_progress")
        .order_by(keys.c.expires_at)
        .limit(BATCH)
    )
)


def make_engine(target: str, durability: str) -> Engine:
    """Return an engine whose connections have the pragmas of all contenders."""
    engine = create_engine(f"sqlite:///{target}")

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: object) -> None:
        for pragma in (*PRAGMAS, f"synchronous={durability}"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


class SQLAlchemyCore(Contender):
    """Statements, without the ORM."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        self.engine = make_engine(target, durability)

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("sqlalchemy")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make the parameters of sessions."""
        if work == "index":
            names = SESSION_COLUMNS[:-1]
            return [
                ([{**dict(zip(names, row, strict=True)), "route": route_key(*row[1:4])} for row in rows],)
                for (rows,) in arguments
            ]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        with self.engine.connect() as connection:
            return connection.execute(DEVICE, {"device": device_id}).first()

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        with self.engine.connect() as connection:
            return self._find_key(connection, device_id, method, key)

    def _find_key(self, connection: Connection, device_id: str, method: str, key: str) -> Any:
        scope = {"device": device_id, "its_method": method, "its_key": key}
        return connection.execute(FIND_KEY, {**scope, "now": self.now()}).first()

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        with self.engine.connect() as connection:
            return connection.execute(SESSIONS, {"agent": agent_id, "most": limit}).all()

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with self.engine.begin() as connection:
            return self._see(connection, device_id)

    def _see(self, connection: Connection, device_id: str) -> bool:
        now = self.now()
        return connection.execute(SEEN, {"device": device_id, "now": now, "before": now - GRANULARITY}).rowcount > 0

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        row = {"nonce": nonce, "device_id": device_id, "created_at": now, "expires_at": expires_at}
        with self.engine.begin() as connection:
            return connection.execute(CONSUME, {**row, "now": now}).rowcount > 0

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with self.engine.begin() as connection:
            return self._store(connection, device_id, method, key, result, state="completed")

    def _store(self, connection: Connection, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        row = {
            **dict.fromkeys(KEY_COLUMNS),
            "device_id": device_id,
            "method": method,
            "key": key,
            "result": json.dumps(result),
            "created_at": now,
            "expires_at": now + DAY,
            "attempt": 1,
            "omitted": 0,
            **others,
        }
        return connection.execute(STORE_KEY, {**row, "now": now}).rowcount > 0

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        with self.engine.begin() as connection:
            if not self._store(connection, device_id, method, key, None, **claimed):
                return False
        scope = {"device": device_id, "its_method": method, "its_key": key}
        done = {"its_owner": owner, "outcome": json.dumps(result), "until": self.now() + DAY}
        with self.engine.begin() as connection:
            return connection.execute(COMPLETE, {**scope, **done}).rowcount > 0

    def index(self, sessions: Sequence[dict[str, Any]]) -> int:
        """Add sessions."""
        with self.engine.begin() as connection:
            connection.execute(INDEX, sessions)
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if self.device(device_id) is not None:
            return
        row = {"id": device_id, "role": "client", "shared_secret_hash": f"sha256$of-{device_id}", "approved": 0}
        with self.engine.begin() as connection:
            connection.execute(insert(devices), {**row, "paired_at": self.now()})
        with self.engine.begin() as connection:
            connection.execute(
                update(devices).where(devices.c.id == device_id).values(approved=1, approved_at=self.now())
            )

    def answer(self, event: Any) -> bool:
        """Take a message."""
        now, device_id, agent_id, session_id = self.now(), event["device"], event["agent"], event["session"]
        with self.engine.begin() as connection:
            self._see(connection, device_id)
            if connection.execute(AGENT, {"agent": agent_id}).first() is None:
                row = {"id": agent_id, "name": agent_id.title(), "workspace_path": f"/srv/agents/{agent_id}"}
                connection.execute(CREATE_AGENT, {**row, "created_at": now})
            if connection.execute(SESSION, {"session": session_id}).first() is None:
                sender, channel = event["sender"], event["channel"]
                values = (session_id, agent_id, sender, channel, now, now, route_key(agent_id, sender, channel))
                row = dict(zip(SESSION_COLUMNS, values, strict=True))
                if not connection.execute(CREATE_SESSION, row).rowcount:
                    connection.execute(CREATE_SESSION, {**row, "route_key": None})
            connection.execute(TOUCH, {"session": session_id, "now": now})
            if self._find_key(connection, device_id, METHOD, event["key"]) is not None:
                return True
            result = {"session": session_id, "accepted_at": now}
            self._store(connection, device_id, METHOD, event["key"], result, state="completed")
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for statement, before in ((SWEEP_NONCES, now - GRACE), (SWEEP_KEYS, now)):
            count = BATCH
            while count == BATCH:
                with self.engine.begin() as connection:
                    count = connection.execute(statement, {"before": before}).rowcount
                total += count
        return total

    def close(self) -> None:
        """Close the pool."""
        self.engine.dispose()
