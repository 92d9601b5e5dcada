"""Hand-written `sqlite3`: what the others are measured against.

One connection, one cursor, SQL as constant text, rows as the driver returns them. It is the SQLite library that
homeagent picks on this machine, with homeagent's pragmas and its statements.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

from homeagent.engine.sqlite.driver import choose_driver

from tests.benchmarks.contender import BATCH, FINGERPRINT, GRACE, GRANULARITY, LEASE, Contender
from tests.benchmarks.data import DAY, METHOD

__all__ = ["Autocommit", "Handwritten", "Objects"]

PRAGMAS = (
    "busy_timeout=30000",
    "foreign_keys=ON",
    "trusted_schema=OFF",
    "cell_size_check=ON",
    f"journal_size_limit={64 * 1024 * 1024}",
)

DEVICE = (
    "SELECT id, role, shared_secret_hash, approved, paired_at, last_seen_at, metadata, approved_at, revoked_at,"
    " revoked_reason, previous_secret_hash, previous_secret_expires_at, proof_verifier FROM devices WHERE id = ?"
)
SEEN = "UPDATE devices SET last_seen_at = ? WHERE id = ? AND (last_seen_at IS NULL OR last_seen_at <= ?)"
CREATE_DEVICE = (
    "INSERT INTO devices (id, role, shared_secret_hash, approved, paired_at, metadata, proof_verifier)"
    " VALUES (?, ?, ?, 0, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
)
APPROVE = "UPDATE devices SET approved = 1, approved_at = ?, revoked_at = NULL, revoked_reason = NULL WHERE id = ?"
CONSUME = (
    "INSERT INTO nonces (nonce, device_id, created_at, expires_at) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (device_id, nonce) DO UPDATE SET created_at = excluded.created_at, expires_at = excluded.expires_at"
    " WHERE nonces.expires_at <= ?"
)
FIND_KEY = (
    "SELECT key, method, device_id, result, created_at, expires_at, state, fingerprint, owner, attempt,"
    " lease_expires_at, downstream_key, omitted FROM idempotency_keys"
    " WHERE device_id = ? AND method = ? AND key = ? AND (expires_at > ? OR state = 'in_progress')"
)
INSERT_KEY = (
    "INSERT INTO idempotency_keys (key, method, device_id, result, created_at, expires_at, state, attempt, omitted)"
    " VALUES (?, ?, ?, ?, ?, ?, 'completed', 1, 0) ON CONFLICT (device_id, method, key) DO UPDATE SET"
    " result = excluded.result, created_at = excluded.created_at, expires_at = excluded.expires_at,"
    " state = 'completed', fingerprint = NULL, owner = NULL, attempt = 1, lease_expires_at = NULL,"
    " downstream_key = NULL, omitted = 0"
    " WHERE idempotency_keys.expires_at <= ? AND idempotency_keys.state != 'in_progress'"
)
CLAIM = (
    "INSERT INTO idempotency_keys (key, method, device_id, result, created_at, expires_at, state, fingerprint, owner,"
    " attempt, lease_expires_at, downstream_key, omitted)"
    " VALUES (?, ?, ?, 'null', ?, ?, 'in_progress', ?, ?, 1, ?, ?, 0) ON CONFLICT (device_id, method, key)"
    " DO UPDATE SET result = excluded.result, created_at = excluded.created_at, expires_at = excluded.expires_at,"
    " state = 'in_progress', fingerprint = excluded.fingerprint, owner = excluded.owner, attempt = 1,"
    " lease_expires_at = excluded.lease_expires_at, downstream_key = excluded.downstream_key, omitted = 0"
    " WHERE idempotency_keys.expires_at <= ? AND idempotency_keys.state != 'in_progress'"
)
COMPLETE = (
    "UPDATE idempotency_keys SET result = ?, expires_at = ?, state = 'completed', owner = ?,"
    " lease_expires_at = NULL, omitted = 0"
    " WHERE device_id = ? AND method = ? AND key = ? AND state = 'in_progress' AND owner = ?"
)
SESSIONS = (
    "SELECT session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key FROM sessions"
    " WHERE agent_id = ? ORDER BY last_active_at DESC, session_id DESC LIMIT ?"
)
SESSION = (
    "SELECT session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key FROM sessions"
    " WHERE session_id = ?"
)
INDEX = (
    "INSERT INTO sessions (session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key)"
    " VALUES (?, ?, ?, ?, ?, ?, CASE WHEN EXISTS (SELECT * FROM sessions WHERE route_key = ?) THEN NULL ELSE ? END)"
    " ON CONFLICT (session_id) DO UPDATE SET last_active_at ="
    " CASE WHEN excluded.last_active_at > sessions.last_active_at THEN excluded.last_active_at"
    " ELSE sessions.last_active_at END"
)
TOUCH = "UPDATE sessions SET last_active_at = ? WHERE session_id = ? AND last_active_at < ?"
AGENT = "SELECT id, name, workspace_path, created_at, config FROM agents WHERE id = ?"
CREATE_AGENT = (
    "INSERT INTO agents (id, name, workspace_path, created_at, config) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (id) DO NOTHING"
)
CREATE_SESSION = (
    "INSERT INTO sessions (session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key)"
    " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
SWEEP_NONCES = (
    "DELETE FROM nonces WHERE (device_id, nonce) IN"
    " (SELECT device_id, nonce FROM nonces WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)"
)
SWEEP_KEYS = (
    "DELETE FROM idempotency_keys WHERE (device_id, method, key) IN (SELECT device_id, method, key"
    " FROM idempotency_keys WHERE expires_at <= ? AND state != 'in_progress' ORDER BY expires_at LIMIT ?)"
)


def route_key(agent_id: str, sender_id: str | None, channel_id: str | None) -> str:
    """Return what names a route; as homeagent has it."""
    route = json.dumps([agent_id, sender_id, channel_id], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(route.encode()).hexdigest()


class Handwritten(Contender):
    """One connection and constant SQL."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        self.connection = self.connect()
        self.cursor: Any = self.connection.cursor()
        self.execute: Callable[..., Any] = self.cursor.execute
        for pragma in (*PRAGMAS, f"synchronous={durability}"):
            self.execute(f"PRAGMA {pragma}")

    def connect(self) -> Any:
        """Return a connection whose transactions are begun by hand."""
        module: Any = choose_driver().module
        return module.connect(self.target, isolation_level=None)

    @classmethod
    def describe(cls) -> str:
        """Return the driver and its SQLite."""
        driver = choose_driver()
        return f"{driver.name}, SQLite {driver.version_text}"

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make results JSON text, and sessions the tuples of their statement."""
        if work in {"insert_key", "claim"}:
            return [(*scope, json.dumps(result)) for *scope, result in arguments]
        if work == "index":
            return [([(*row, route := route_key(*row[1:4]), route) for row in rows],) for (rows,) in arguments]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        execute = self.execute
        execute("BEGIN")
        row = execute(DEVICE, (device_id,)).fetchone()
        execute("COMMIT")
        return row

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        execute = self.execute
        execute("BEGIN")
        row = execute(FIND_KEY, (device_id, method, key, self.now())).fetchone()
        execute("COMMIT")
        return row

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        execute = self.execute
        execute("BEGIN")
        rows = execute(SESSIONS, (agent_id, limit)).fetchall()
        execute("COMMIT")
        return rows

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        now = self.now()
        return self.write(SEEN, (now, device_id, now - GRANULARITY))

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        return self.write(CONSUME, (nonce, device_id, now, expires_at, now))

    def insert_key(self, device_id: str, method: str, key: str, result: str) -> bool:
        """Store a result."""
        now = self.now()
        return self.write(INSERT_KEY, (key, method, device_id, result, now, now + DAY, now))

    def claim(self, device_id: str, method: str, key: str, result: str) -> bool:
        """Claim and complete."""
        now, owner = self.now(), token_hex(16)
        claimed = (key, method, device_id, now, now + DAY, FINGERPRINT, owner, now + LEASE, token_hex(16), now)
        return self.write(CLAIM, claimed) and self.write(
            COMPLETE, (result, self.now() + DAY, owner, device_id, method, key, owner)
        )

    def write(self, sql: str, parameters: tuple[Any, ...]) -> bool:
        """Run one statement in a transaction, and tell whether it wrote."""
        execute = self.execute
        execute("BEGIN IMMEDIATE")
        try:
            wrote: bool = execute(sql, parameters).rowcount > 0
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise
        return wrote

    def index(self, sessions: Sequence[Any]) -> int:
        """Add sessions."""
        self.execute("BEGIN IMMEDIATE")
        try:
            self.cursor.executemany(INDEX, sessions)
            self.execute("COMMIT")
        except BaseException:
            self.execute("ROLLBACK")
            raise
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if self.device(device_id) is not None:
            return
        self.write(CREATE_DEVICE, (device_id, "client", f"sha256$of-{device_id}", self.now(), None, None))
        self.execute("BEGIN IMMEDIATE")
        self.execute(DEVICE, (device_id,)).fetchone()
        self.execute(APPROVE, (self.now(), device_id))
        self.execute("COMMIT")

    def answer(self, event: Any) -> bool:
        """Take a message."""
        execute, now = self.execute, self.now()
        device_id, agent_id, session_id = event["device"], event["agent"], event["session"]
        execute("BEGIN IMMEDIATE")
        try:
            execute(SEEN, (now, device_id, now - GRANULARITY))
            if execute(AGENT, (agent_id,)).fetchone() is None:
                execute(CREATE_AGENT, (agent_id, agent_id.title(), f"/srv/agents/{agent_id}", now, None))
            if execute(SESSION, (session_id,)).fetchone() is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                row = (session_id, agent_id, sender, channel, now, now)
                if not execute(CREATE_SESSION, (*row, route)).rowcount:
                    execute(CREATE_SESSION, (*row, None))
            execute(TOUCH, (now, session_id, now))
            retry: bool = execute(FIND_KEY, (device_id, METHOD, event["key"], now)).fetchone() is not None
            if not retry:
                result = json.dumps({"session": session_id, "accepted_at": now})
                execute(INSERT_KEY, (event["key"], METHOD, device_id, result, now, now + DAY, now))
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise
        return retry

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for sql, before in ((SWEEP_NONCES, now - GRACE), (SWEEP_KEYS, now)):
            count = BATCH
            while count == BATCH:
                self.execute("BEGIN IMMEDIATE")
                count = self.execute(sql, (before, BATCH)).rowcount
                self.execute("COMMIT")
                total += count
        return total

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class Autocommit(Handwritten):
    """The same without BEGIN and COMMIT around a read: the least that a single SELECT can cost."""

    def device(self, device_id: str) -> Any:
        """Find a device."""
        return self.execute(DEVICE, (device_id,)).fetchone()

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        return self.execute(FIND_KEY, (device_id, method, key, self.now())).fetchone()

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        return self.execute(SESSIONS, (agent_id, limit)).fetchall()


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def instant(milliseconds: int | None) -> datetime | None:
    """Return the instant of a stored number."""
    return None if milliseconds is None else EPOCH + timedelta(milliseconds=milliseconds)


@dataclass
class DeviceRecord:
    """A device in Python's types."""

    id: str
    role: str
    shared_secret_hash: str
    approved: bool
    paired_at: datetime | None
    last_seen_at: datetime | None
    metadata: Any
    approved_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    previous_secret_hash: str | None
    previous_secret_expires_at: datetime | None
    proof_verifier: str | None


@dataclass
class SessionRecord:
    """A session in Python's types."""

    session_id: str
    agent_id: str
    sender_id: str | None
    channel_id: str | None
    created_at: datetime | None
    last_active_at: datetime | None
    route_key: str | None


@dataclass
class KeyRecord:
    """An idempotency key in Python's types."""

    key: str
    method: str
    device_id: str
    result: Any
    created_at: datetime | None
    expires_at: datetime | None
    state: str
    fingerprint: str | None
    owner: str | None
    attempt: int
    lease_expires_at: datetime | None
    downstream_key: str | None
    omitted: bool


class Objects(Handwritten):
    """The same with what an application does next: rows become dataclasses, their values Python's types."""

    def device(self, device_id: str) -> Any:
        """Find a device."""
        row = super().device(device_id)
        if row is None:
            return None
        return DeviceRecord(
            row[0],
            row[1],
            row[2],
            row[3] != 0,
            instant(row[4]),
            instant(row[5]),
            None if row[6] is None else json.loads(row[6]),
            instant(row[7]),
            instant(row[8]),
            *row[9:11],
            instant(row[11]),
            row[12],
        )

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        row = super().find_key(device_id, method, key)
        if row is None:
            return None
        return KeyRecord(
            *row[:3],
            json.loads(row[3]),
            instant(row[4]),
            instant(row[5]),
            *row[6:10],
            instant(row[10]),
            row[11],
            row[12] != 0,
        )

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        return [
            SessionRecord(*row[:4], instant(row[4]), instant(row[5]), row[6])
            for row in super().agent_sessions(agent_id, limit)
        ]
