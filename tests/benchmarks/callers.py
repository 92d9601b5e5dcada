"""Durable commits a second with many callers at once, and what `run` costs a lone one.

Each way is a process of its own: python -m tests.benchmarks.callers WAY CALLERS SECONDS TARGET DURABILITY
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

from homeagent import Database, UnitOfWork
from tests.benchmarks.contestants import ROOT, BenchmarkError
from tests.benchmarks.data import count_rows
from tests.benchmarks.measuring import spread
from tests.benchmarks.workshop import DURABILITIES, Workshop

__all__ = ["ARUN", "RUN", "WAYS", "compared", "measure_callers", "percentile"]

COUNTS = (1, 8, 64, 256)
DEVICES = 10

HANDWRITTEN = "sqlite3 and a lock, threads"
UNITS = "unit_of_work, threads"
RUN = "run, threads"
UNITS_ASYNC = "unit_of_work in a worker thread, asyncio"
ARUN = "arun, asyncio"
LONE = "lone"

WAYS = (HANDWRITTEN, UNITS, RUN, UNITS_ASYNC, ARUN)

COMPARED = ((64, RUN, UNITS), (256, ARUN, UNITS_ASYNC))
"""How many callers, in which way, are compared with which other way: what goals are about."""


def compared(callers: int, way: str) -> str:
    """Return what a comparison is called in the results."""
    return f"{callers} {way}"


Write = Callable[[int, int], object]
"""Commits the nonce of one call of one caller."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values doesn't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _consume(until: datetime, caller: int, call: int) -> Callable[[UnitOfWork], bool]:
    device_id, nonce = f"device-{caller % DEVICES:08}", f"{caller}-{call}"
    return lambda unit: unit.nonces.consume(device_id, nonce, expires_at=until, limit=10_000_000)


def _in_threads(callers: int, seconds: float, write: Write) -> tuple[list[float], float]:
    """Return how long each call took, and how long all of them."""
    ready = threading.Barrier(callers + 1)
    taken: list[list[float]] = [[] for _ in range(callers)]
    deadline = 0.0

    def call_again(caller: int) -> None:
        write(caller, -1)
        ready.wait()
        ready.wait()
        times, call = taken[caller], 0
        start = time.perf_counter()
        while start < deadline:
            write(caller, call)
            now = time.perf_counter()
            times.append(now - start)
            start, call = now, call + 1

    threads = [threading.Thread(target=call_again, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.perf_counter()
    deadline = begun + seconds
    ready.wait()
    for thread in threads:
        thread.join()
    return [each for times in taken for each in times], time.perf_counter() - begun


async def _in_tasks(
    callers: int, seconds: float, write: Callable[[int, int], Awaitable[object]]
) -> tuple[list[float], float]:
    taken: list[float] = []
    await asyncio.gather(*(write(caller, -1) for caller in range(callers)))
    begun = time.perf_counter()

    async def call_again(caller: int) -> None:
        start, call = time.perf_counter(), 0
        while start < begun + seconds:
            await write(caller, call)
            now = time.perf_counter()
            taken.append(now - start)
            start, call = now, call + 1

    await asyncio.gather(*(call_again(caller) for caller in range(callers)))
    return taken, time.perf_counter() - begun


def _handwritten(target: str, durability: str) -> Write:
    from tests.benchmarks.contenders.handwritten import Handwritten
    from tests.benchmarks.data import DAY, now_ms

    class Shared(Handwritten):
        def connect(self) -> Any:
            from homeagent.engine.sqlite.driver import choose_driver

            module: Any = choose_driver().module
            return module.connect(self.target, isolation_level=None, check_same_thread=False)

    contender, lock, until = Shared(target, durability), threading.Lock(), now_ms() + DAY

    def write(caller: int, call: int) -> None:
        with lock:
            contender.consume(f"device-{caller % DEVICES:08}", f"{caller}-{call}", until)

    return write


def _measure(way: str, callers: int, seconds: float, target: str, durability: Any) -> dict[str, Any]:
    until = datetime.now(UTC) + timedelta(days=1)
    if way == HANDWRITTEN:
        times, elapsed = _in_threads(callers, seconds, _handwritten(target, durability))
        return _summary(callers, times, elapsed)
    with Database.open(target, durability=durability) as database:

        def alone(caller: int, call: int) -> bool:
            with database.unit_of_work() as unit:
                return _consume(until, caller, call)(unit)

        def together(caller: int, call: int) -> bool:
            return database.run(_consume(until, caller, call))

        if way == LONE:
            return _lone(seconds, alone, together)
        if way == UNITS:
            times, elapsed = _in_threads(callers, seconds, alone)
        elif way == RUN:
            times, elapsed = _in_threads(callers, seconds, together)
        elif way == UNITS_ASYNC:
            times, elapsed = asyncio.run(_units_in_workers(callers, seconds, alone))
        else:
            times, elapsed = asyncio.run(
                _in_tasks(callers, seconds, lambda caller, call: database.arun(_consume(until, caller, call)))
            )
    return _summary(callers, times, elapsed)


async def _units_in_workers(callers: int, seconds: float, alone: Write) -> tuple[list[float], float]:
    """Do what an application does that has no `arun`: hand each unit to a worker thread."""
    from anyio import CapacityLimiter, to_thread

    places = CapacityLimiter(64)
    return await _in_tasks(
        callers, seconds, lambda caller, call: to_thread.run_sync(alone, caller, call, limiter=places)
    )


def _summary(callers: int, times: list[float], elapsed: float) -> dict[str, Any]:
    return {
        "commits": len(times) + callers,
        "rate": len(times) / elapsed,
        "p50": percentile(times, 0.5),
        "p99": percentile(times, 0.99),
    }


def _lone(seconds: float, alone: Write, together: Write) -> dict[str, Any]:
    """Take turns in short blocks, and compare each block of the one way with its neighbour of the other."""
    block, calls = 40, 0
    times: dict[str, list[float]] = {"unit_of_work": [], "run": []}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or calls < 10 * block:
        order = [("unit_of_work", alone), ("run", together)]
        for name, write in order if calls // (2 * block) % 2 else order[::-1]:
            start = time.perf_counter()
            for call in range(calls, calls + block):
                write(0, call)
            times[name].append((time.perf_counter() - start) / block)
            calls += block
    ratios = [run / unit for unit, run in zip(times["unit_of_work"], times["run"], strict=True)][1:]
    return {
        "commits": calls,
        "unit_of_work": median(times["unit_of_work"]),
        "run": median(times["run"]),
        "ratio": median(ratios),
        "ratio_p10": percentile(ratios, 0.1),
        "ratio_p90": percentile(ratios, 0.9),
    }


def _in_process(workshop: Workshop, way: str, callers: int, seconds: float, durability: str) -> dict[str, Any]:
    """Measure one way in a process of its own, and count what it committed.

    Raises:
        BenchmarkError: it failed, or the file does not hold all that it was told is committed.
    """
    path = workshop.fresh(workshop.rows)
    arguments = [way, str(callers), str(seconds), str(path), durability]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.callers", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode:
        raise BenchmarkError(f"{way} with {callers} callers ended with status {ran.returncode}, see above")
    found: dict[str, Any] = json.loads(ran.stdout)
    rows = count_rows(path)["nonces"]
    shutil.rmtree(path.parent)
    if rows != workshop.rows + found["commits"]:
        raise BenchmarkError(f"{way}: {found['commits']} commits left {rows - workshop.rows} rows")
    return found


def measure_callers(workshop: Workshop) -> dict[str, Any]:
    """Return commits a second at `full` by way and number of callers, and what `run` costs one caller alone.

    What goals compare is measured more often than the rest. What is there after each round is kept.
    """
    counts = (1, 8) if workshop.quick else COUNTS
    seconds = 0.2 if workshop.quick else 1.0
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {way: {str(n): [] for n in counts} for way in WAYS}
    lone: dict[str, Any] = {}
    for durability in DURABILITIES:
        workshop.say(f"one alone, {durability}")
        lone[durability] = _in_process(workshop, LONE, 1, 4 * seconds, durability)
    plan = workshop.plan
    for number in range(max(plan.rounds, plan.pairs)):
        for callers in counts:
            for way in WAYS:
                if number < plan.rounds or any(callers == many and way in pair for many, *pair in COMPARED):
                    workshop.say(f"round {number + 1} of {max(plan.rounds, plan.pairs)}: {callers}, {way}")
                    runs[way][str(callers)].append(_in_process(workshop, way, callers, seconds, "full"))
        workshop.keep(
            results := {
                "rounds": max(plan.rounds, plan.pairs),
                "measured": {way: {count: _middle(each) for count, each in row.items()} for way, row in runs.items()},
                "compared": {
                    compared(callers, way): spread(_rates(runs[way][str(callers)], runs[alone][str(callers)]))
                    for callers, way, alone in COMPARED
                    if callers in counts
                },
                "lone": lone,
            }
        )
    return results


def _rates(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    return [run["rate"] / other["rate"] for run, other in zip(runs, others, strict=True)]


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["rate"] for run in runs]
    return {
        "rate": median(rates),
        "rate_min": min(rates),
        "rate_max": max(rates),
        "p50": median(run["p50"] for run in runs),
        "p99": median(run["p99"] for run in runs),
    }


if __name__ == "__main__":
    way, callers, seconds, target, durability = sys.argv[1:]
    sys.stdout.write(json.dumps(_measure(way, int(callers), float(seconds), target, durability)))
