"""sqlite-utils: its Database and its tables, with SQL where it has no method of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from secrets import token_hex
from typing import Any

from sqlite_utils import Database
from sqlite_utils.db import NotFoundError

from tests.benchmarks.contender import (
    BATCH,
    FINGERPRINT,
    GRACE,
    GRANULARITY,
    LEASE,
    SESSION_COLUMNS,
    Contender,
)
from tests.benchmarks.contenders import handwritten as sql
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["SqliteUtils"]


class SqliteUtils(Contender):
    """Rows as dicts."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        self.database: Any = Database(target)
        for pragma in (*PRAGMAS, f"synchronous={durability}"):
            self.database.conn.execute(f"PRAGMA {pragma}")

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("sqlite-utils")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make dicts of sessions."""
        if work == "index":
            return [
                ([dict(zip(SESSION_COLUMNS, (*row, route_key(*row[1:4])), strict=True)) for row in rows],)
                for (rows,) in arguments
            ]
        return arguments

    def _get(self, table: str, key: Any) -> Any:
        try:
            return self.database[table].get(key)
        except NotFoundError:
            return None

    def device(self, device_id: str) -> Any:
        """Find a device."""
        return self._get("devices", device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        return next(self.database.query(sql.FIND_KEY, (device_id, method, key, self.now())), None)

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        order = "last_active_at DESC, session_id DESC"
        return list(self.database["sessions"].rows_where("agent_id = ?", [agent_id], order_by=order, limit=limit))

    def _write(self, statement: str, parameters: Sequence[Any]) -> bool:
        wrote: int = self.database.conn.execute(statement, parameters).rowcount
        return wrote > 0

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with self.database.conn:
            return self._see(device_id)

    def _see(self, device_id: str) -> bool:
        now = self.now()
        return self._write(sql.SEEN, (now, device_id, now - GRANULARITY))

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        with self.database.conn:
            return self._write(sql.CONSUME, (nonce, device_id, now, expires_at, now))

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with self.database.conn:
            return self._store(device_id, method, key, result)

    def _store(self, device_id: str, method: str, key: str, result: Any) -> bool:
        now = self.now()
        return self._write(sql.INSERT_KEY, (key, method, device_id, json.dumps(result), now, now + DAY, now))

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        now, owner = self.now(), token_hex(16)
        claimed = (key, method, device_id, now, now + DAY, FINGERPRINT, owner, now + LEASE, token_hex(16), now)
        with self.database.conn:
            if not self._write(sql.CLAIM, claimed):
                return False
        with self.database.conn:
            return self._write(
                sql.COMPLETE, (json.dumps(result), self.now() + DAY, owner, device_id, method, key, owner)
            )

    def index(self, sessions: Sequence[dict[str, Any]]) -> int:
        """Add sessions, or replace those that exist."""
        self.database["sessions"].upsert_all(sessions, pk="session_id")
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if self.device(device_id) is None:
            row = {"id": device_id, "role": "client", "shared_secret_hash": f"sha256$of-{device_id}", "approved": 0}
            self.database["devices"].insert({**row, "paired_at": self.now()})
            self.database["devices"].update(device_id, {"approved": 1, "approved_at": self.now()})

    def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        with self.database.conn:
            self._see(event["device"])
            if self._get("agents", agent_id) is None:
                path = f"/srv/agents/{agent_id}"
                self._write(sql.CREATE_AGENT, (agent_id, agent_id.title(), path, now, None))
            if self._get("sessions", session_id) is None:
                sender, channel = event["sender"], event["channel"]
                row = (session_id, agent_id, sender, channel, now, now)
                if not self._write(sql.CREATE_SESSION, (*row, route_key(agent_id, sender, channel))):
                    self._write(sql.CREATE_SESSION, (*row, None))
            self._write(sql.TOUCH, (now, session_id, now))
            if self.find_key(event["device"], METHOD, event["key"]) is not None:
                return True
            self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for statement, before in ((sql.SWEEP_NONCES, now - GRACE), (sql.SWEEP_KEYS, now)):
            count = BATCH
            while count == BATCH:
                with self.database.conn:
                    count = self.database.conn.execute(statement, (before, BATCH)).rowcount
                total += count
        return total

    def close(self) -> None:
        """Close the connection."""
        self.database.close()
