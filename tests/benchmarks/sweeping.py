"""What a writer notices of a sweep: its p50, p99 and longest wait while dead rows go, a million of them at first.

The writer is a process of its own: python -m tests.benchmarks.sweeping TARGET MODE SECONDS
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from homeagent.engine.sqlite.driver import choose_driver

from homeagent import Database
from tests.benchmarks.callers import percentile
from tests.benchmarks.contestants import ROOT, BenchmarkError
from tests.benchmarks.data import DAY, count_rows, now_ms
from tests.benchmarks.measuring import copy_database, spread
from tests.benchmarks.workshop import Workshop

__all__ = ["MODES", "measure_sweeping"]

DEAD = 1_000_000
SECONDS = 6.0

ALONE = "alone"
THREAD = "swept in another thread"
PROCESS = "swept in another process"
MODES = (ALONE, THREAD, PROCESS)

SWEEP = (
    "import sys; from datetime import timedelta; from homeagent import Database;"
    "database = Database.open(sys.argv[1]); report = database.sweep(time_budget=timedelta(seconds=float(sys.argv[2])));"
    "print(report.nonces + report.idempotency_keys); database.close()"
)


def add_dead_rows(path: Path, count: int) -> None:
    """Add rows that died two days ago, half of them nonces and half of them idempotency keys."""
    module: Any = choose_driver().module
    values = {"count": count // 2, "born": now_ms() - 3 * DAY, "dead": now_ms() - 2 * DAY}
    numbers = "WITH RECURSIVE number(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM number WHERE i + 1 < :count)"
    with closing(module.connect(str(path), isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=-500000")
        # Scattered over the key, as random nonces are.
        for statement in (
            "INSERT INTO nonces (nonce, device_id, created_at, expires_at)"
            " SELECT lower(hex(randomblob(16))), printf('device-%08d', i % 1000), :born, :dead + i FROM number",
            "INSERT INTO idempotency_keys"
            " (key, method, device_id, result, created_at, expires_at, state, attempt, omitted)"
            " SELECT lower(hex(randomblob(12))), 'lamp.switch', printf('device-%08d', i % 1000), '{\"on\": true}',"
            " :born, :dead + i, 'completed', 1, 0 FROM number",
        ):
            connection.execute(f"{numbers} {statement}", values)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _write(target: str, mode: str, seconds: float) -> dict[str, Any]:
    """Write as fast as one writer can, for so long or until the sweep ends, and return what it noticed."""
    until = datetime.now(UTC) + timedelta(days=1)
    swept: list[int] = []
    over = threading.Event()
    times: list[float] = []
    with Database.open(target) as database:

        def write(call: int) -> None:
            with database.unit_of_work() as unit:
                unit.nonces.consume(f"device-{call % 10:08}", f"w{call}", expires_at=until, limit=10_000_000)

        def sweep_here() -> None:
            report = database.sweep(time_budget=timedelta(seconds=seconds))
            swept.append(report.nonces + report.idempotency_keys)
            over.set()

        def sweep_there() -> None:
            ran = subprocess.run(
                [sys.executable, "-c", SWEEP, target, str(seconds)], stdout=subprocess.PIPE, text=True, check=True
            )
            swept.append(int(ran.stdout))
            over.set()

        for call in range(100):
            write(call)
        begun = time.perf_counter()
        if mode == ALONE:
            timer = threading.Timer(seconds, over.set)
            timer.start()
        else:
            threading.Thread(target=sweep_here if mode == THREAD else sweep_there).start()
        call, start = 100, time.perf_counter()
        while not over.is_set():
            write(call)
            now = time.perf_counter()
            times.append(now - start)
            start, call = now, call + 1
        elapsed = time.perf_counter() - begun
    return {
        "writes": call,
        "rate": len(times) / elapsed,
        "p50": percentile(times, 0.5),
        "p99": percentile(times, 0.99),
        "max": max(times),
        "swept": sum(swept),
        "seconds": elapsed,
    }


def measure_sweeping(workshop: Workshop) -> dict[str, Any]:
    """Return what a writer notices, by mode; each time on a fresh copy, and the modes take turns.

    Raises:
        BenchmarkError: rows are missing, or none was swept.
    """
    dead = 2_000 if workshop.quick else DEAD
    # Between processes SQLite gives the lock to whoever asks at the right moment, and a writer that never pauses asks
    # most often: without a bound that sweep would not end.
    seconds = 0.5 if workshop.quick else SECONDS
    workshop.say(f"adding {dead:,} dead rows")
    template = workshop.fresh(workshop.rows)
    add_dead_rows(template, dead)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(workshop.plan.pairs):
        for mode in MODES:
            workshop.say(f"round {number + 1} of {workshop.plan.pairs}: a writer, {mode}")
            path = copy_database(template, workshop.room())
            runs[mode].append(_in_process(path, mode, seconds, 2 * workshop.rows + dead))
            shutil.rmtree(path.parent)
        alone = [run["p99"] for run in runs[ALONE]]
        workshop.keep(
            results := {
                "rounds": workshop.plan.pairs,
                "dead": dead,
                "seconds": seconds,
                "measured": {mode: _middle(each, alone) for mode, each in runs.items()},
            }
        )
    return results


def _in_process(path: Path, mode: str, seconds: float, rows: int) -> dict[str, Any]:
    """Measure one mode in a process of its own, and count what is left of so many nonces and keys."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sweeping", str(path), mode, str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode:
        raise BenchmarkError(f"a writer, {mode}, ended with status {ran.returncode}, see above")
    found: dict[str, Any] = json.loads(ran.stdout)
    left = count_rows(path)
    expected = rows - found["swept"] + found["writes"]
    if (found["swept"] > 0) == (mode == ALONE) or left["nonces"] + left["idempotency_keys"] != expected:
        raise BenchmarkError(f"{mode}: {found['swept']} rows were swept, {found['writes']} written, {left} are left")
    return found


def _middle(runs: list[dict[str, Any]], alone: list[float]) -> dict[str, Any]:
    """Return the medians of some runs, the longest wait of all, and the ratios to the p99 of a writer alone."""
    return {
        "rate": median(run["rate"] for run in runs),
        "p50": median(run["p50"] for run in runs),
        "p99": median(run["p99"] for run in runs),
        "max": max(run["max"] for run in runs),
        "swept": median(run["swept"] / run["seconds"] for run in runs),
        **spread([run["p99"] / base for run, base in zip(runs, alone, strict=True)]),
        "samples": runs,
    }


if __name__ == "__main__":
    target, mode, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(_write(target, mode, float(seconds))))
