"""Hand-written SQL: `sqlite3`, which is the baseline of every other contender, and apsw.

The baseline is the plainest program for the work: one connection of the interpreter's own `sqlite3`, constant SQL, rows
as tuples. A read is one SELECT in autocommit mode. A write is BEGIN IMMEDIATE, one statement, COMMIT.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.benchmarks.contender import DAY, METHOD, RESULT, SECRET_HASH, START, Clock, Event, Filled

DDL = """
CREATE TABLE devices (
    id TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('client', 'node', 'admin')),
    shared_secret_hash TEXT NOT NULL, approved BIGINT NOT NULL, paired_at BIGINT NOT NULL, last_seen_at BIGINT,
    metadata TEXT);
CREATE TABLE agents (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, workspace_path TEXT NOT NULL, created_at BIGINT NOT NULL, config TEXT);
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL REFERENCES agents (id), sender_id TEXT, channel_id TEXT,
    created_at BIGINT NOT NULL, last_active_at BIGINT NOT NULL);
CREATE INDEX sessions_of_agent ON sessions (agent_id, last_active_at, session_id);
CREATE INDEX sessions_of_sender ON sessions (sender_id);
CREATE TABLE nonces (
    device_id TEXT NOT NULL, nonce TEXT NOT NULL, created_at BIGINT NOT NULL, expires_at BIGINT NOT NULL,
    PRIMARY KEY (device_id, nonce)) WITHOUT ROWID;
CREATE INDEX nonces_by_expiry ON nonces (expires_at);
CREATE TABLE idempotency_keys (
    key TEXT NOT NULL, method TEXT NOT NULL, device_id TEXT NOT NULL, result TEXT NOT NULL, created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL, PRIMARY KEY (device_id, method, key));
CREATE INDEX keys_by_expiry ON idempotency_keys (expires_at);
"""
"""The tables of all contenders except homeagent."""

COLUMNS = {
    "device": ("id", "role", "shared_secret_hash", "approved", "paired_at", "last_seen_at", "metadata"),
    "key": ("key", "method", "device_id", "result", "created_at", "expires_at"),
    "session": ("session_id", "agent_id", "sender_id", "channel_id", "created_at", "last_active_at"),
}

DEVICE = "SELECT * FROM devices WHERE id = ?"
KEY = "SELECT * FROM idempotency_keys WHERE device_id = ? AND method = ? AND key = ? AND expires_at > ?"
SESSIONS = "SELECT * FROM sessions WHERE agent_id = ? ORDER BY last_active_at DESC, session_id DESC LIMIT ?"
SEEN = "UPDATE devices SET last_seen_at = ? WHERE id = ?"
CONSUME = "INSERT INTO nonces VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
INSERT_KEY = "INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
STORE_KEY = "INSERT OR REPLACE INTO idempotency_keys VALUES (?, ?, ?, ?, ?, ?)"
SEE_DEVICE = (
    "INSERT INTO devices VALUES (?, 'client', ?, 1, ?, ?, NULL)"
    " ON CONFLICT (id) DO UPDATE SET last_seen_at = excluded.last_seen_at"
)
CREATE_AGENT = "INSERT INTO agents VALUES (?, ?, '/srv/agent', ?, NULL) ON CONFLICT DO NOTHING"
TOUCH_SESSION = (
    "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (session_id) DO UPDATE SET last_active_at = excluded.last_active_at"
)


def pragmas(durability: str) -> tuple[str, ...]:
    """Return the pragmas of each connection of a contender except homeagent."""
    return "PRAGMA busy_timeout = 30000", "PRAGMA foreign_keys = ON", f"PRAGMA synchronous = {durability}"


def fill(path: Path, filled: Filled) -> None:
    """Create a database with the plain tables."""
    result = json.dumps(RESULT)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(DDL)
        rows: dict[str, list[tuple[Any, ...]]] = {
            "devices": [(f"d{i}", "client", SECRET_HASH, 1, START, None, None) for i in range(filled.devices)],
            "agents": [(f"a{i}", "A", "/srv/agent", START, None) for i in range(filled.agents)],
            "sessions": [
                (f"s{i}", f"a{i % filled.agents}", f"u{i}", f"c{i % 7}", START + i, START + i)
                for i in range(filled.sessions)
            ],
            "idempotency_keys": [
                (f"k{i}", METHOD, f"d{i % filled.devices}", result, START, START + DAY) for i in range(filled.keys)
            ],
        }
        for table, values in rows.items():
            if values:
                marks = ", ".join("?" * len(values[0]))
                connection.executemany(f"INSERT INTO {table} VALUES ({marks})", values)


class ByHand:
    """Constant SQL on one connection. A subclass connects, and returns the number of changed rows."""

    def __init__(self, path: Path, durability: str, clock: Clock) -> None:
        self.clock = clock
        self.connection = self.connect(path)
        self.execute = self.connection.execute
        for pragma in pragmas(durability):
            self.execute(pragma).fetchall()

    def connect(self, path: Path) -> Any:
        """Return a connection that begins no transaction automatically."""
        raise NotImplementedError

    def write(self, sql: str, parameters: tuple[Any, ...]) -> bool:
        """Run one statement in a transaction, and return whether it changed a row."""
        raise NotImplementedError

    def device(self, device_id: str) -> Any:
        return self.execute(DEVICE, (device_id,)).fetchone()

    def find_key(self, device_id: str, key: str) -> Any:
        return self.execute(KEY, (device_id, METHOD, key, self.clock.ms)).fetchone()

    def sessions(self, agent_id: str, limit: int) -> Any:
        return self.execute(SESSIONS, (agent_id, limit)).fetchall()

    def seen(self, device_id: str) -> bool:
        return self.write(SEEN, (self.clock.ms, device_id))

    def consume(self, device_id: str, nonce: str) -> bool:
        now = self.clock.ms
        return self.write(CONSUME, (device_id, nonce, now, now + DAY))

    def insert_key(self, device_id: str, key: str) -> bool:
        now = self.clock.ms
        return self.write(INSERT_KEY, (key, METHOD, device_id, json.dumps(RESULT), now, now + DAY))

    def answer(self, event: Event) -> bool:
        execute, now = self.execute, self.clock.ms
        device_id, agent_id, key = event["device"], event["agent"], event["key"]
        execute("BEGIN IMMEDIATE")
        execute(SEE_DEVICE, (device_id, SECRET_HASH, now, now))
        execute(CREATE_AGENT, (agent_id, agent_id, now))
        execute(TOUCH_SESSION, (event["session"], agent_id, event["sender"], event["channel"], now, now))
        retry: bool = self.find_key(device_id, key) is not None
        if not retry:
            execute(STORE_KEY, (key, METHOD, device_id, json.dumps(RESULT), now, now + DAY))
        execute("COMMIT")
        return retry

    def close(self) -> None:
        self.connection.close()


class Sqlite3(ByHand):
    """The interpreter's own `sqlite3`."""

    def connect(self, path: Path) -> Any:
        return sqlite3.connect(path, isolation_level=None)

    def write(self, sql: str, parameters: tuple[Any, ...]) -> bool:
        execute = self.execute
        execute("BEGIN IMMEDIATE")
        changed: int = execute(sql, parameters).rowcount
        execute("COMMIT")
        return changed > 0


class Apsw(ByHand):
    """apsw, which brings an SQLite library of its own."""

    def connect(self, path: Path) -> Any:
        import apsw

        return apsw.Connection(str(path))

    def write(self, sql: str, parameters: tuple[Any, ...]) -> bool:
        execute = self.execute
        execute("BEGIN IMMEDIATE")
        execute(sql, parameters)
        changed: int = self.connection.changes()
        execute("COMMIT")
        return changed > 0
