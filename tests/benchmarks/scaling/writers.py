"""How many commits a second several processes make on one store, and what one of them waits.

Run as a program it is one of these processes: it says that it is ready, waits for a line, and then consumes nonces.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import quantiles
from typing import Any
from uuid import uuid4

from homeagent import Database
from tests.benchmarks.scaling.stores import ENGINES, Place, fill

__all__ = ["measure_writers"]


def measure_writers(place: Place, *, processes: list[int], seconds: float, rows: int) -> dict[str, Any]:
    """Return, by engine and number of processes, the commits a second of all, and waits in milliseconds."""
    results: dict[str, Any] = {}
    for engine in ENGINES:
        target = place.new_store(engine)
        fill(target, rows)
        results[engine] = {str(number): _together(target, number, seconds) for number in processes}
    return results


def _together(target: str, number: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling.writers", target, str(seconds)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        waits: list[float] = []
        for child in children:
            out, _ = child.communicate(timeout=seconds + 120)
            assert child.returncode == 0
            waits += json.loads(out)
    finally:
        for child in children:
            child.kill()
            child.wait()
    parts = quantiles(waits, n=100)
    return {
        "commits_per_second": round(len(waits) / seconds, 1),
        "median_ms": round(parts[49] * 1e3, 3),
        "p99_ms": round(parts[98] * 1e3, 3),
        "max_ms": round(max(waits) * 1e3, 3),
    }


def _write(target: str, seconds: float) -> list[float]:
    waits = []
    with Database.open(target) as database:
        device = uuid4().hex
        expires_at = database._clock().replace(year=9999)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            with database.unit_of_work() as unit:
                # A bound that is out of the way: one process plays many devices.
                assert unit.nonces.consume(device, uuid4().hex, expires_at=expires_at, limit=2**31 - 1)
            waits.append(time.perf_counter() - start)
    return waits


if __name__ == "__main__":
    json.dump(_write(sys.argv[1], float(sys.argv[2])), sys.stdout)
