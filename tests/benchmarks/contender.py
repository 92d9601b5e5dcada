"""What a contender is: one way to use the database, with a method for each piece of work."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from secrets import token_hex
from typing import Any

from tests.benchmarks.data import DAY, now_ms

__all__ = ["AsyncContender", "Contender", "Tally", "plain"]

DEVICE_COLUMNS = (
    "id",
    "role",
    "shared_secret_hash",
    "approved",
    "paired_at",
    "last_seen_at",
    "metadata",
    "approved_at",
    "revoked_at",
    "revoked_reason",
    "previous_secret_hash",
    "previous_secret_expires_at",
    "proof_verifier",
)
KEY_COLUMNS = (
    "key",
    "method",
    "device_id",
    "result",
    "created_at",
    "expires_at",
    "state",
    "fingerprint",
    "owner",
    "attempt",
    "lease_expires_at",
    "downstream_key",
    "omitted",
)
SESSION_COLUMNS = (
    "session_id",
    "agent_id",
    "sender_id",
    "channel_id",
    "created_at",
    "last_active_at",
    "route_key",
)

LEASE = 60_000
GRANULARITY = 60_000
GRACE = 3_600_000
BATCH = 100
FINGERPRINT = "0" * 64

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Tally:
    """What a replay of the trace did, the same for every contender."""

    refused: int = 0
    retries: int = 0
    swept: int = 0


class Contender(ABC):
    """One way to use the database. Each call is a transaction of its own, unless it says otherwise.

    Args:
        target: the file, or the URL of a server.
        durability: `full` or `normal`: SQLite's `synchronous`.
        traced: whether the clock shows the time of the event that is replayed, and not the present.
    """

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        self.target = target
        self.durability = durability
        self.traced = traced
        self.moment = 0

    def now(self) -> int:
        """Return the milliseconds since the epoch."""
        return self.moment if self.traced else now_ms()

    @classmethod
    @abstractmethod
    def describe(cls) -> str:
        """Return the versions of what is measured."""

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Return the arguments in the types that a program of this kind would have at hand; not measured."""
        return arguments

    def claimed(self) -> dict[str, Any]:
        """Return what a claim writes beside its key: an owner who is drawn anew, and a lease."""
        return {
            "state": "in_progress",
            "owner": token_hex(16),
            "fingerprint": FINGERPRINT,
            "downstream_key": token_hex(16),
            "lease_expires_at": self.now() + LEASE,
        }

    # Reads: what was found, in the contender's own types

    @abstractmethod
    def device(self, device_id: str) -> Any:
        """Find a device."""

    @abstractmethod
    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live idempotency key."""

    @abstractmethod
    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions of an agent, last active first."""

    # Writes: whether anything was written

    @abstractmethod
    def seen(self, device_id: str) -> Any:
        """Remember that a device was seen now, unless that was a minute ago or less."""

    @abstractmethod
    def consume(self, device_id: str, nonce: str, expires_at: Any) -> Any:
        """Use up a nonce; False for a replay."""

    @abstractmethod
    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> Any:
        """Store a result for a day; False where there is a live one."""

    @abstractmethod
    def claim(self, device_id: str, method: str, key: str, result: Any) -> Any:
        """Claim a key in one transaction, complete it in a second one; False where it was claimed before."""

    @abstractmethod
    def index(self, sessions: Sequence[Any]) -> Any:
        """Add sessions, or move on those that exist, in one transaction; return how many there were."""

    # The trace

    @abstractmethod
    def welcome(self, device_id: str) -> Any:
        """Make sure that a device exists and is approved."""

    @abstractmethod
    def answer(self, event: Any) -> Any:
        """Take a fresh message: see its device, find or make agent and session, store the result if there is none.

        Returns:
            Whether there was one, so that this is a retry.
        """

    @abstractmethod
    def sweep(self) -> Any:
        """Delete dead nonces and keys in batches of 100, each a transaction, and return how many went."""

    def replay(self, events: Iterable[Mapping[str, Any]]) -> Tally:
        """Live through a trace, as docs/examples/gateway.py does."""
        tally = Tally()
        known: set[str] = set()
        next_sweep = 0
        for event in events:
            now = self.moment = event["at"]
            device_id = event["device"]
            if now >= next_sweep:
                tally.swept += self.sweep() if next_sweep else 0
                next_sweep = now + DAY
            if device_id not in known:
                self.welcome(device_id)
                known.add(device_id)
            if not self.consume(device_id, event["nonce"], self.until(now + DAY)):
                tally.refused += 1
            elif self.answer(event):
                tally.retries += 1
        return tally

    def until(self, milliseconds: int) -> Any:
        """Return an instant in the type that `consume` takes."""
        return milliseconds

    @abstractmethod
    def close(self) -> Any:
        """Let go of the database."""


class AsyncContender(Contender):
    """A contender whose methods are coroutines."""

    @abstractmethod
    async def open(self) -> None:
        """Connect, in the event loop that everything else runs in."""

    async def replay(self, events: Iterable[Mapping[str, Any]]) -> Tally:  # type: ignore[override]  # awaited by the worker
        """Live through a trace; the same steps as the synchronous one."""
        tally = Tally()
        known: set[str] = set()
        next_sweep = 0
        for event in events:
            now = self.moment = event["at"]
            device_id = event["device"]
            if now >= next_sweep:
                tally.swept += await self.sweep() if next_sweep else 0
                next_sweep = now + DAY
            if device_id not in known:
                await self.welcome(device_id)
                known.add(device_id)
            if not await self.consume(device_id, event["nonce"], self.until(now + DAY)):
                tally.refused += 1
            elif await self.answer(event):
                tally.retries += 1
        return tally


_COLUMNS = {"device": DEVICE_COLUMNS, "find_key": KEY_COLUMNS, "agent_sessions": SESSION_COLUMNS}
_JSON = frozenset({"metadata", "result"})


def plain(work: str, answer: Any) -> Any:
    """Return a contender's answer in one form for all: rows as dicts, instants as milliseconds, JSON decoded."""
    columns = _COLUMNS.get(work)
    if columns is None or answer is None:
        return answer
    if work == "agent_sessions":
        return [_plain_row(columns, row) for row in answer]
    return _plain_row(columns, answer)


def _plain_row(columns: Sequence[str], row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        values = [row[name] for name in columns]
    elif isinstance(row, Sequence):
        values = list(row)
    else:
        # `metadata` is taken on the classes of SQLAlchemy.
        values = [
            getattr(row, "metadata_" if name == "metadata" and hasattr(row, "metadata_") else name) for name in columns
        ]
    return {name: _plain_value(name, value) for name, value in zip(columns, values, strict=True)}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return (value - EPOCH) // timedelta(milliseconds=1)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool):
        return int(value)
    if name in _JSON and isinstance(value, str):
        return json.loads(value)
    return value
