"""Contenders that are wrong in one way each: the checks must find every one of them out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.contender import Tally
from tests.benchmarks.contenders.handwritten import Handwritten

__all__ = ["WRONG"]


class AnotherDevice(Handwritten):
    """Finds the first device whatever is asked."""

    def device(self, device_id: str) -> Any:
        """Find one."""
        return super().device("device-00000000")


class AnotherResult(Handwritten):
    """Finds the key with another result in it."""

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find it."""
        row = super().find_key(device_id, method, key)
        return row and (*row[:3], '{"on": false}', *row[4:])


class OneSessionShort(Handwritten):
    """Leaves the last session of a page out."""

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List the others."""
        return super().agent_sessions(agent_id, limit - 1)


class ForeverSeen(Handwritten):
    """Writes again within the minute."""

    def seen(self, device_id: str) -> bool:
        """Write."""
        return self.write("UPDATE devices SET last_seen_at = ? WHERE id = ?", (self.now(), device_id))


class ReplayAdmitted(Handwritten):
    """Lets a used nonce in."""

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Consume, and say it was fresh."""
        super().consume(device_id, nonce, expires_at)
        return True


class ResultReplaced(Handwritten):
    """Answers a duplicate with yes."""

    def insert_key(self, device_id: str, method: str, key: str, result: str) -> bool:
        """Insert, and say it was new."""
        super().insert_key(device_id, method, key, result)
        return True


class NeverCompleted(Handwritten):
    """Claims, and forgets to complete."""

    def claim(self, device_id: str, method: str, key: str, result: str) -> bool:
        """Store nothing but the key."""
        return super().insert_key(device_id, method, key, "null")


class IndexedHalf(Handwritten):
    """Adds every other session, and counts them all."""

    def index(self, sessions: Sequence[Any]) -> int:
        """Add them."""
        super().index(sessions[::2])
        return len(sessions)


class NothingWritten(Handwritten):
    """Does all work but for the commit once the checks are over."""

    calls = 0

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Say it was fresh."""
        self.calls += 1
        return super().consume(device_id, nonce, expires_at) if self.calls <= 4 else True


class TraceCutShort(Handwritten):
    """Leaves the last message of the trace out."""

    def replay(self, events: Iterable[Mapping[str, Any]]) -> Tally:
        """Live through most of it."""
        return super().replay(list(events)[:-1])


class Broken(Handwritten):
    """Raises at one piece of work, and is right at the others."""

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Divide by zero."""
        return 1 // 0


class Dying(Handwritten):
    """Ends its process at one piece of work, and is right at the others."""

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """End."""
        os._exit(3)


WRONG: dict[str, type[Handwritten]] = {
    "device": AnotherDevice,
    "find_key": AnotherResult,
    "agent_sessions": OneSessionShort,
    "seen": ForeverSeen,
    "consume": ReplayAdmitted,
    "insert_key": ResultReplaced,
    "claim": NeverCompleted,
    "index": IndexedHalf,
    "trace": TraceCutShort,
}
"""By the work that each is wrong at."""
