"""How long `Database.copy_to` takes, and how much memory.

Run as a program it is one such copy: it prints the rows, the seconds and its peak of resident memory in bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from homeagent import Database
from tests.benchmarks.scaling.stores import Place, fill

__all__ = ["measure_copies"]


def measure_copies(place: Place, *, sizes: list[int]) -> dict[str, Any]:
    """Return, by direction and size, the rows, the seconds and the peak of memory in bytes."""
    results: dict[str, Any] = {"sqlite to postgresql": {}, "postgresql to sqlite": {}}
    for size in sizes:
        source = place.new_store("sqlite")
        # Of each hundred rows 48 are nonces, 48 are keys and 4 are sessions, some hundreds of devices apart.
        fill(source, size * 100 // 210)
        server, back = place.new_store("postgresql"), place.new_store("sqlite")
        results["sqlite to postgresql"][str(size)] = _copy(source, server)
        results["postgresql to sqlite"][str(size)] = _copy(server, back)
    return results


def _copy(source: str, target: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.scaling.moving", source, target],
        check=True,
        capture_output=True,
        text=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _main(source: str, target: str) -> None:
    with Database.open(source) as ours, Database.open(target) as theirs:
        start = time.perf_counter()
        rows = sum(ours.copy_to(theirs).rows.values())
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    json.dump({"rows": rows, "seconds": round(seconds, 2), "peak_bytes": peak}, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])
