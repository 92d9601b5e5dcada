"""What a writer notices of a sweep: its p50, p99 and longest wait while dead rows go, a million of them at first.

The writer is a process of its own: python -m tests.benchmarks.sweeping TARGET MODE SECONDS
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from homeagent import Database
from homeagent.engine.sqlite.driver import choose_driver
from tests.benchmarks.callers import percentile
from tests.benchmarks.contestants import ROOT, BenchmarkError
from tests.benchmarks.data import DAY, count_rows, now_ms
from tests.benchmarks.measuring import copy_database
from tests.benchmarks.workshop import Workshop

__all__ = ["MODES", "measure_sweeping"]

DEAD = 1_000_000

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
    """Return what a writer notices, by mode.

    Raises:
        BenchmarkError: rows are missing, or none was swept.
    """
    dead = 2_000 if workshop.quick else DEAD
    # Between processes SQLite gives the lock to whoever asks at the right moment, and a writer that never pauses asks
    # most often: without a bound that sweep would not end.
    seconds = 0.5 if workshop.quick else 30.0
    workshop.say(f"sweeping: adding {dead:,} dead rows")
    template = workshop.fresh(workshop.rows)
    add_dead_rows(template, dead)
    measured: dict[str, Any] = {}
    for mode in MODES:
        workshop.say(f"sweeping: a writer, {mode}")
        path = copy_database(template, workshop.room())
        ran = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.sweeping", str(path), mode, str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        if ran.returncode:
            raise BenchmarkError(f"a writer, {mode}, ended with status {ran.returncode}, see above")
        found = measured[mode] = json.loads(ran.stdout)
        rows = count_rows(path)
        expected = 2 * workshop.rows + dead - found["swept"] + found["writes"]
        if (found["swept"] > 0) == (mode == ALONE) or rows["nonces"] + rows["idempotency_keys"] != expected:
            raise BenchmarkError(
                f"{mode}: {found['swept']} rows were swept, {found['writes']} written, and {rows} are left"
            )
    return {"dead": dead, "measured": measured}


if __name__ == "__main__":
    target, mode, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(_write(target, mode, float(seconds))))
