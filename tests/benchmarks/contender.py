"""The interface of a contender, and the clock, ids and constants of all contenders."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypedDict

TRACE = Path(__file__).parents[1] / "fixtures" / "gateway.jsonl.gz"

DAY = 86_400_000
"""Milliseconds. Nonces and keys expire a day after they were written."""

METHOD = "lamp.switch"
RESULT = {"on": True, "level": 7}
SECRET_HASH = "sha256$" + "ab" * 32
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
START = (datetime(2026, 3, 1, tzinfo=UTC) - EPOCH) // timedelta(milliseconds=1)


class Clock:
    """A clock that stands still until a measurement moves it. Each contender has its own clock.

    Attributes:
        ms: milliseconds since the epoch, for contenders that store numbers.
        now: the same timestamp, for homeagent.
    """

    def __init__(self, ms: int = START) -> None:
        self.set(ms)

    def set(self, ms: int) -> None:
        """Set the time."""
        self.ms = ms
        self.now = EPOCH + timedelta(milliseconds=ms)

    def __call__(self) -> datetime:
        """Return the timestamp."""
        return self.now


@dataclass(frozen=True)
class Filled:
    """Numbers of rows in a database before a measurement.

    The ids are `d0`, `d1` … for devices, `a0` … for agents, `s0` … for sessions and `k0` … for idempotency keys.
    Session number i belongs to agent i modulo `agents`, key number i to device i modulo `devices`.
    """

    devices: int = 1_000
    agents: int = 10
    sessions: int = 10_000
    keys: int = 1_000


class Event(TypedDict):
    """One line of the recorded trace: a signed message that a gateway received."""

    at: int
    device: str
    sender: str
    channel: str
    agent: str
    session: str
    nonce: str
    key: str


def read_trace(limit: int | None = None) -> list[Event]:
    """Return the first `limit` events of the recorded trace, or all if `limit` is None."""
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


class Contender(Protocol):
    """One way to use the database: the protocol of the classes in `contenders`. Each call is one transaction.

    A read returns a row in the contender's own type, or None. A write returns whether a row changed.
    """

    def __init__(self, path: Path, durability: str, clock: Clock) -> None:
        """Open the database at `path`, which already contains rows. `durability` is `full` or `normal`."""

    def device(self, device_id: str) -> Any:
        """Find a device."""

    def find_key(self, device_id: str, key: str) -> Any:
        """Find an idempotency key of the method `METHOD` that has not expired."""

    def sessions(self, agent_id: str, limit: int) -> Any:
        """List an agent's sessions, the last active first."""

    def seen(self, device_id: str) -> bool:
        """Set a device's `last_seen_at` to now."""

    def consume(self, device_id: str, nonce: str) -> bool:
        """Store a nonce; return False if the nonce is stored already."""

    def insert_key(self, device_id: str, key: str) -> bool:
        """Store `RESULT` under an idempotency key; return False if the key exists."""

    def answer(self, event: Event) -> bool:
        """Record a message whose nonce was consumed.

        In one transaction: create the approved device, the agent and the session if they are absent, set the times of
        device and session, look the idempotency key up, and store a result if there is none.

        Returns:
            True if a result was already stored, because the message is a retry.
        """

    def close(self) -> None:
        """Close the database."""
