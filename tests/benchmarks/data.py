"""The database that is measured: what its rows are called, what they hold, and a file that is full of them."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homeagent.engine.sqlite.driver import choose_driver

from homeagent import Database

__all__ = [
    "DAY",
    "METADATA",
    "METHOD",
    "RESULT",
    "TABLES",
    "TRACE",
    "Rows",
    "count_rows",
    "make_database",
    "now_ms",
    "read_trace",
]

TRACE = Path(__file__).resolve().parents[1] / "fixtures" / "gateway.jsonl.gz"

METHOD = "lamp.switch"
RESULT = {"on": True, "level": 7}
METADATA = {"room": "hall", "floor": 2}

DAY = 86_400_000
TABLES = ("devices", "agents", "sessions", "nonces", "idempotency_keys")


def now_ms() -> int:
    """Return the milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Rows:
    """How many rows each large table holds, and what the rows are called.

    Attributes:
        count: of devices, sessions, nonces and idempotency keys each.
        since: the milliseconds since the epoch that their instants count from.
    """

    count: int
    since: int

    @property
    def agents(self) -> int:
        """How many agents share the sessions: each has 100 or more."""
        return max(1, min(self.count // 100, 1000))

    def device_id(self, number: int) -> str:
        """Return the id of a device."""
        return f"device-{number:08}"

    def agent_id(self, number: int) -> str:
        """Return the id of an agent."""
        return f"agent-{number:05}"

    def key(self, number: int) -> tuple[str, str, str]:
        """Return device, method and key of a record that is there."""
        return self.device_id(number // 100), METHOD, f"key-{number:010}"

    def device(self, number: int) -> dict[str, Any]:
        """Return what must be found of a device."""
        return {
            "id": self.device_id(number),
            "role": "node" if number % 3 else "client",
            "shared_secret_hash": f"sha256$salt${number:064x}",
            "approved": 1,
            "paired_at": self.since + number,
            "metadata": METADATA,
        }

    def sessions_of(self, agent: int, limit: int) -> list[dict[str, Any]]:
        """Return what must be listed of an agent's sessions, last active first."""
        last = self.count - 1 - (self.count - 1 - agent) % self.agents
        numbers = range(last, -1, -self.agents)[:limit]
        return [
            {
                "session_id": f"session-{number:010}",
                "agent_id": self.agent_id(agent),
                "sender_id": f"sender-{number // 10}",
                "channel_id": None if number % 3 else "main",
                "created_at": self.since + number,
                "last_active_at": self.since + number + 1000,
            }
            for number in numbers
        ]


# Each counts up, in the order of its table's primary key, so that ten million rows are appended and not scattered.
_FILL = {
    "agents": """
        INSERT INTO agents (id, name, workspace_path, created_at, config)
        SELECT printf('agent-%05d', i), 'Agent', '/srv/agent', :since, NULL FROM number""",
    "devices": """
        INSERT INTO devices (id, role, shared_secret_hash, approved, paired_at, approved_at, metadata)
        SELECT printf('device-%08d', i), iif(i % 3, 'node', 'client'), printf('sha256$salt$%064x', i), 1, :since + i,
            :since + i, :metadata FROM number""",
    "sessions": """
        INSERT INTO sessions (session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key)
        SELECT printf('session-%010d', i), printf('agent-%05d', i % :agents), printf('sender-%d', i / 10),
            iif(i % 3, NULL, 'main'), :since + i, :since + i + 1000, lower(hex(randomblob(32))) FROM number""",
    "nonces": """
        INSERT INTO nonces (nonce, device_id, created_at, expires_at)
        SELECT printf('%032x', i), printf('device-%08d', i / 100), :since + i % 1000, :until + i % 1000 FROM number""",
    "idempotency_keys": """
        INSERT INTO idempotency_keys
            (key, method, device_id, result, created_at, expires_at, state, attempt, omitted)
        SELECT printf('key-%010d', i), :method, printf('device-%08d', i / 100), :result, :since + i % 1000,
            :until + i % 1000, 'completed', 1, 0 FROM number""",
}


def make_database(path: Path, count: int) -> Rows:
    """Make a database of the newest revision with `count` rows in each large table; with 0 it is empty.

    Its nonces and keys live for another 30 days.
    """
    Database.open(path).close()
    rows = Rows(count, now_ms() - DAY)
    if not count:
        return rows
    module: Any = choose_driver().module
    with closing(module.connect(str(path), isolation_level=None)) as connection:
        # Nobody else has it open, and a crash costs nothing but another try: no log, and indexes made at the end.
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA cache_size=-1000000")
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        for table, insert in _FILL.items():
            total = rows.agents if table == "agents" else count
            connection.execute(
                "WITH RECURSIVE number(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM number WHERE i + 1 < :total)"
                + insert,
                {
                    "total": total,
                    "agents": rows.agents,
                    "since": rows.since,
                    "until": rows.since + 31 * DAY,
                    "method": METHOD,
                    "result": json.dumps(RESULT),
                    "metadata": json.dumps(METADATA),
                },
            )
        for _, statement in indexes:
            connection.execute(statement)
        connection.execute("PRAGMA journal_mode=WAL")
    return rows


def count_rows(path: Path) -> dict[str, int]:
    """Return how many rows each table of a database has, read by this process."""
    module: Any = choose_driver().module
    with closing(module.connect(str(path))) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def read_trace(limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first `limit` events of the recorded trace, or all."""
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]
