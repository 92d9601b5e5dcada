"""Four ways to write with homeagent: `run_once`, `run`, group commit, and a writer at the same time as a sweep."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from typing import Any

from homeagent import UnitOfWork
from tests.benchmarks.contender import DAY, METHOD, Clock, Filled
from tests.benchmarks.contenders.by_hand import Sqlite3
from tests.benchmarks.contenders.homeagent_ import HomeAgent, fill, scope
from tests.benchmarks.measuring import Bench, BenchmarkError, percentile
from tests.benchmarks.operations import BASELINE, DURABILITIES, opened

CROWDED = "nonce consume, device with 5,000 nonces"
ONCE = "run_once with an empty effect"
LONE = "database.run() with only one caller"
TASKS = "durable commits of 256 asyncio callers"
THREADS = "durable commits of 64 threads"
SWEEP = "p99 of a write during a sweep"

CLAIM = "INSERT INTO idempotency_keys VALUES (?, ?, ?, '', ?, ?)"
COMPLETE = "UPDATE idempotency_keys SET result = ? WHERE device_id = ? AND method = ? AND key = ?"


def measure(bench: Bench) -> None:
    """Measure each row of the report."""
    for durability in DURABILITIES:
        if bench.wants(CROWDED, ONCE, LONE, TASKS, THREADS):
            _writers(bench, durability)
    if bench.wants(SWEEP):
        _sweep(bench)


def _writers(bench: Bench, durability: str) -> None:
    filled = bench.sizes.filled
    with (
        opened(BASELINE, bench.folder(), durability, filled) as (first, _, _),
        opened("homeagent", bench.folder(), durability, filled) as (second, clock, _),
    ):
        assert isinstance(first, Sqlite3)
        assert isinstance(second, HomeAgent)
        _run_once(bench, durability, first, second)
        if durability == "full":
            _storm(bench, first, second, clock)
        _lone(bench, durability, second)
        _crowded(bench, durability, second)


def _run_once(bench: Bench, durability: str, by_hand: Sqlite3, homeagent: HomeAgent) -> None:
    devices = bench.sizes.filled.devices

    def twice(i: int) -> bool:
        now, device_id, key = by_hand.clock.ms, f"d{i % devices}", f"o{i}"
        return by_hand.write(CLAIM, (key, METHOD, device_id, now, now + DAY)) and by_hand.write(
            COMPLETE, ('{"ok": true}', device_id, METHOD, key)
        )

    def once(i: int) -> object:
        return homeagent.database.run_once(scope(f"d{i % devices}", f"o{i}"), lambda attempt: {"ok": True}, params=i)

    bench.compare(ONCE, durability, {BASELINE: twice, "homeagent": once})


def _consume(homeagent: HomeAgent, devices: int, prefix: str) -> Callable[[int], Callable[[UnitOfWork], bool]]:
    """Return a function that, for a number, returns a function that consumes a nonce in a unit of work."""
    until = homeagent.clock.now + timedelta(hours=1)
    return lambda i: lambda uow: uow.nonces.consume(f"d{i % devices}", f"{prefix}{i}-abcdefgh", expires_at=until)


def _lone(bench: Bench, durability: str, homeagent: HomeAgent) -> None:
    through_run, in_unit = (_consume(homeagent, bench.sizes.filled.devices, prefix) for prefix in ("run", "unit"))

    def unit(i: int) -> bool:
        work = in_unit(i)
        with homeagent.database.unit_of_work() as uow:
            return work(uow)

    calls = {"unit_of_work": unit, "homeagent": lambda i: homeagent.database.run(through_run(i))}
    bench.compare(LONE, durability, calls)


def _crowded(bench: Bench, durability: str, homeagent: HomeAgent) -> None:
    if not bench.wants(CROWDED):
        return
    with homeagent.database.unit_of_work() as uow:
        for i in range(bench.sizes.crowd):
            uow.nonces.consume("crowded", f"c{i}", expires_at=homeagent.clock.now + timedelta(hours=1))
    calls = {
        "few nonces": lambda i: homeagent.consume(f"fresh{i % 10}", f"f{i}-abcdefghijkl"),
        "homeagent": lambda i: homeagent.consume("crowded", f"f{i}-abcdefghijkl"),
    }
    # Make fewer calls, because a device can have at most 10,000 nonces.
    bench.compare(CROWDED, durability, calls, share=0.2)


def _storm(bench: Bench, by_hand: Sqlite3, homeagent: HomeAgent, clock: Clock) -> None:
    """Compare group commit, with many callers that each wait for a commit, with single commits of hand-written SQL."""
    database, numbers = homeagent.database, count()

    def one_by_one(total: int) -> None:
        for _ in range(total):
            i = next(numbers)
            by_hand.consume(f"d{i % bench.sizes.filled.devices}", f"b{i}-abcdefgh")

    def tasks(total: int) -> None:
        async def caller() -> None:
            for _ in range(total // 256):
                await database.arun(work(next(numbers)))

        async def callers() -> None:
            await asyncio.gather(*(caller() for _ in range(256)))

        asyncio.run(callers())

    def threads(total: int) -> None:
        def caller(_: int) -> None:
            for _ in range(total // 64):
                database.run(work(next(numbers)))

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(caller, range(64)))

    for row, storm in ((TASKS, tasks), (THREADS, threads)):
        if not bench.wants(row):
            continue
        rates: dict[str, list[float]] = {"one by one": [], "homeagent": []}
        for _ in range(bench.sizes.few_rounds):
            # Move the clock, so that the nonces of the previous round have expired.
            clock.set(clock.ms + 3 * DAY // 24)
            database.sweep()
            work = _consume(homeagent, bench.sizes.filled.devices, "storm")
            for name, write in zip(rates, (one_by_one, storm), strict=True):
                start = time.perf_counter()
                write(bench.sizes.commits)
                rates[name].append(bench.sizes.commits / (time.perf_counter() - start))
        bench.add(row, "full", rates)


def _sweep(bench: Bench) -> None:
    """Measure a writer alone, and then while another thread of the same process sweeps."""
    path = bench.folder() / "gateway.db"
    fill(path, Filled(devices=0, agents=0, sessions=0, keys=0))
    clock, sizes = Clock(), bench.sizes
    homeagent = HomeAgent(path, "full", clock)
    database, numbers = homeagent.database, count()
    times: dict[str, list[float]] = {"alone": [], "homeagent": []}

    def write(ended: Callable[[], bool]) -> float:
        waits: list[float] = []
        while not ended() or not waits:
            i = next(numbers)
            start = time.perf_counter()
            homeagent.consume(f"w{i // 1_000}", f"{i}-abcdefghijkl")
            waits.append(time.perf_counter() - start)
        return percentile(waits, 0.99)

    for turn in range(sizes.few_rounds):
        for begin in range(0, sizes.dead, 1_000):
            with database.unit_of_work() as uow:
                for i in range(begin, min(begin + 1_000, sizes.dead)):
                    uow.nonces.consume(f"dead{i % 100}", f"{turn}-{i}", expires_at=clock.now + timedelta(hours=1))
        clock.set(clock.ms + DAY // 2)
        end = time.perf_counter() + sizes.writing
        times["alone"].append(write(lambda: time.perf_counter() > end))  # noqa: B023  called at once
        reports: list[Any] = []
        budget = timedelta(seconds=sizes.writing)
        sweep = threading.Thread(target=lambda: reports.append(database.sweep(time_budget=budget)))  # noqa: B023  joined below
        sweep.start()
        times["homeagent"].append(write(lambda: not sweep.is_alive()))  # noqa: B023  called at once
        sweep.join()
        if not reports or not reports[0].nonces:
            raise BenchmarkError(f"{SWEEP}: nothing was swept")
        # Delete the rows that remain after the time budget was used up.
        database.sweep()
    homeagent.close()
    bench.add(SWEEP, "full", times)
