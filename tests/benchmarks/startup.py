"""Starting: whole processes that import homeagent and open a file, beside those that only import SQLModel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from tests.benchmarks.contestants import ROOT, BenchmarkError
from tests.benchmarks.measuring import spread
from tests.benchmarks.workshop import Workshop

__all__ = ["HOMEAGENT", "measure_startup"]

HOMEAGENT = "import homeagent, and open an up-to-date file"
SQLMODEL = "import sqlmodel"
NOTHING = "an empty program"

PROGRAMS = {
    SQLMODEL: "import sqlmodel",
    HOMEAGENT: "import sys, homeagent; homeagent.Database.open(sys.argv[1]).close()",
    NOTHING: "pass",
}
CHECK = "import sys, homeagent; homeagent.Database.open(sys.argv[1]).close(); print('alembic' in sys.modules)"


def _start(program: str, target: str, environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds of a process, on the clock and on the CPU."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, target], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchmarkError(f"a process that is to start ended with status {process.returncode}, see above")
    return elapsed, usage.ru_utime + usage.ru_stime


def measure_startup(workshop: Workshop) -> dict[str, Any]:
    """Return seconds by program, the ratio to SQLModel's, and whether Alembic was imported."""
    target = str(workshop.fresh(0))
    # An installed package brings its bytecode; a checkout must be let write it, or its source is compiled each time.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(workshop.directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    turns = 2 if workshop.quick else 15
    wall: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    cpu: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(turns + 1):
        workshop.say(f"{turn} of {turns}")
        for name, program in PROGRAMS.items():
            seconds, used = _start(program, target, environment)
            if turn:
                # The first turn writes and reads what the others find in the caches.
                wall[name].append(seconds)
                cpu[name].append(used)
    imported = subprocess.run([sys.executable, "-c", CHECK, target], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ratios = {name: [one / base for one, base in zip(wall[name], wall[SQLMODEL], strict=True)] for name in PROGRAMS}
    return {
        "rounds": turns,
        "alembic_imported": imported.stdout.strip() != "False",
        "measured": {
            name: {
                "seconds": median(wall[name]),
                "cpu": median(cpu[name]),
                **spread(ratios[name]),
                "ratio_cpu": median(cpu[name]) / median(cpu[SQLMODEL]),
            }
            for name in PROGRAMS
        },
    }
