"""homeagent from below, a layer more each time; and both ends of that with the processor's caches emptied in between.

Two neighbours do the same and differ in one layer, so that the difference of their times is what that layer costs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from homeagent.clock import system_clock
from homeagent.engine.engine import open_engines
from homeagent.models.types import encode_json
from homeagent.stores import devices, idempotency_keys, nonces, sessions
from tests.benchmarks.contender import GRANULARITY, Contender
from tests.benchmarks.contenders.handwritten import Handwritten
from tests.benchmarks.contenders.homeagent_ import DAY, HomeAgent

__all__ = ["ColdHandwritten", "ColdHomeAgent", "OnLink", "OnUnit"]

MINUTE = timedelta(milliseconds=GRANULARITY)
DISTURBANCE = 1024 * 1024
"""How much other memory is read before a call, in bytes: about what a core has of its own."""


class OnUnit(HomeAgent):
    """The stores' statements and a unit of work: nothing is checked, and nobody asks how many nonces a device has."""

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make JSON text of results: to check and to encode them is the stores' work."""
        if work == "insert_key":
            return [(*scope, encode_json(result)) for *scope, result in arguments]
        return super().prepare(work, arguments)

    def read(self, statement: Any, **parameters: Any) -> Any:
        """Return what the first row of a statement stands for."""
        with self.database.unit_of_work(read_only=True) as unit:
            return unit.one(statement, **parameters)

    def page(self, statement: Any, **parameters: Any) -> Any:
        """Return what the rows of a statement stand for."""
        with self.database.unit_of_work(read_only=True) as unit:
            return unit.all(statement, **parameters)

    def change(self, statement: Any, **parameters: Any) -> bool:
        """Run a statement, and tell whether it wrote."""
        with self.database.unit_of_work() as unit:
            return unit.write(statement, **parameters) > 0

    def device(self, device_id: str) -> Any:
        """Find a device."""
        return self.read(devices._FIND, id=device_id)

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        return self.read(idempotency_keys._FIND, device_id=device_id, method=method, key=key, now=system_clock())

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        return self.page(_SESSIONS, agent_id=agent_id, limit=limit)

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        now = system_clock()
        return self.change(devices._SEEN, device_id=device_id, at=now, before=now - MINUTE)

    def consume(self, device_id: str, nonce: str, expires_at: datetime) -> bool:
        """Use up a nonce."""
        return self.change(nonces._CONSUME, device_id=device_id, nonce=nonce, now=system_clock(), expires_at=expires_at)

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        now = system_clock()
        return self.change(
            idempotency_keys._INSERT,
            device_id=device_id,
            method=method,
            key=key,
            json=result,
            now=now,
            expires_at=now + DAY,
        )


_SESSIONS = sessions._list(agent=True, sender=False, channel=False, after=False)


class OnLink(OnUnit):
    """The stores' statements on a link that nobody else uses: parameters converted, models made of rows."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        (engine,) = open_engines()
        self.reader = engine.readers.acquire(0)
        self.writer = engine.writers.acquire(0)

    def read(self, statement: Any, **parameters: Any) -> Any:
        """Return what the first row of a statement stands for."""
        link = self.reader
        link.begin()
        found = link.one(statement, parameters)
        link.commit()
        return found

    def page(self, statement: Any, **parameters: Any) -> Any:
        """Return what the rows of a statement stand for."""
        link = self.reader
        link.begin()
        found = link.all(statement, parameters)
        link.commit()
        return found

    def change(self, statement: Any, **parameters: Any) -> bool:
        """Run a statement, and tell whether it wrote."""
        link = self.writer
        link.begin()
        wrote = link.write(statement, parameters) > 0
        link.commit()
        return wrote

    def close(self) -> Any:
        """Give the links back, and close the database."""
        (engine,) = open_engines()
        engine.readers.release(self.reader)
        engine.writers.release(self.writer)
        return super().close()


def _disturbed(method: Callable[..., Any]) -> Callable[..., Any]:
    other = bytes(range(1, 256)) * (DISTURBANCE // 255)

    def call(*arguments: Any) -> Any:
        other.count(0)
        return method(*arguments)

    return call


def _cold(contender: type[Contender]) -> dict[str, Callable[..., Any]]:
    """Return the contender's pieces of work, each after other memory was read: as when it had slept meanwhile."""
    names = ("device", "find_key", "agent_sessions", "seen", "consume", "insert_key")
    return {name: _disturbed(getattr(contender, name)) for name in names}


ColdHandwritten = type("ColdHandwritten", (Handwritten,), _cold(Handwritten))
ColdHomeAgent = type("ColdHomeAgent", (HomeAgent,), _cold(HomeAgent))
