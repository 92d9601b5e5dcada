"""What one caller waits for each operation, by engine and by the number of rows that are there already."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from statistics import quantiles
from typing import Any
from uuid import uuid4

from homeagent import Attempt, Database, IdempotencyScope
from tests.benchmarks.scaling.stores import AGENTS, DEVICES, ENGINES, NOW, Place, fill, scattered

__all__ = ["WORKS", "measure_operations"]

Work = Callable[[Database, int], None]


def _device(database: Database, number: int) -> None:
    with database.unit_of_work(read_only=True) as unit:
        unit.devices.get(f"device-{number % DEVICES}")


def _find(database: Database, number: int) -> None:
    with database.unit_of_work(read_only=True) as unit:
        assert unit.idempotency_keys.find(_known(number)) is not None


def _page(database: Database, number: int) -> None:
    with database.unit_of_work(read_only=True) as unit:
        unit.sessions.list(agent_id=f"agent-{number % AGENTS}", limit=50)


def _last_seen(database: Database, number: int) -> None:
    with database.unit_of_work() as unit:
        # Each time a minute later than the device's last, or nothing would be written.
        at = NOW - timedelta(days=365) + timedelta(minutes=number)
        assert unit.devices.update_last_seen(f"device-{number % DEVICES}", at)


def _nonce(database: Database, number: int) -> None:
    with database.unit_of_work() as unit:
        assert unit.nonces.consume(f"device-{number % DEVICES}", uuid4().hex, expires_at=NOW + timedelta(days=1))


def _insert(database: Database, number: int) -> None:
    with database.unit_of_work() as unit:
        unit.idempotency_keys.insert(_new(number), {"ok": True}, ttl=timedelta(days=1))


def _once(database: Database, number: int) -> None:
    def effect(attempt: Attempt) -> bool:
        return True

    assert not database.run_once(_new(number), effect).replayed


def _known(number: int) -> IdempotencyScope:
    return IdempotencyScope(f"device-{number % 100}", "door.open", scattered(number % 100))


def _new(number: int) -> IdempotencyScope:
    return IdempotencyScope(f"device-{number % DEVICES}", "door.open", uuid4().hex)


WORKS: dict[str, Work] = {
    "a device by its id": _device,
    "a stored result": _find,
    "50 sessions of an agent": _page,
    "last seen, written": _last_seen,
    "a nonce consumed": _nonce,
    "a result stored": _insert,
    "`run_once`: two commits": _once,
}


def measure_operations(place: Place, *, sizes: list[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Return, by work, engine and size, the median and the 99th percentile in microseconds.

    The engines and sizes take turns within each round, so that what else the machine does falls on all of them.
    """
    with ExitStack() as stack:
        databases: dict[tuple[str, int], Database] = {}
        for engine in ENGINES:
            for size in sizes:
                target = place.new_store(engine)
                fill(target, size)
                databases[engine, size] = stack.enter_context(Database.open(target, clock=lambda: NOW))
        samples: dict[str, dict[tuple[str, int], list[float]]] = {
            name: {store: [] for store in databases} for name in WORKS
        }
        numbers = dict.fromkeys(databases, 0)
        for _ in range(rounds):
            for name, work in WORKS.items():
                for store, database in databases.items():
                    numbers[store] = _sample(work, database, numbers[store], seconds, samples[name][store])
        return {
            name: {engine: {str(size): _summary(by_store[engine, size]) for size in sizes} for engine in ENGINES}
            for name, by_store in samples.items()
        }


def _sample(work: Work, database: Database, number: int, seconds: float, durations: list[float]) -> int:
    work(database, number)  # what is only done once
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        number += 1
        start = time.perf_counter()
        work(database, number)
        durations.append(time.perf_counter() - start)
    return number + 1


def _summary(durations: list[float]) -> dict[str, float]:
    parts = quantiles(durations * 2, n=100)  # twice, since it takes two or more
    return {"median": round(parts[49] * 1e6, 1), "p99": round(parts[98] * 1e6, 1), "calls": len(durations)}
