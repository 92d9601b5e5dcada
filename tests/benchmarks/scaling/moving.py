"""How long `Database.copy_to` takes, and how much memory: each copy is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

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
        [sys.executable, "-m", "tests.benchmarks.scaling.copy_process", source, target],
        check=True,
        capture_output=True,
        text=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
