"""How fast is it, against the others and against its goals?

Everything is measured in one run, the contenders taking turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.callers import measure_callers
from tests.benchmarks.contestants import CONTESTANTS, BenchmarkError, choose
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.measuring import Plan
from tests.benchmarks.operations import NAMES, measure_operations
from tests.benchmarks.page import write_page
from tests.benchmarks.postgresql import measure_postgresql
from tests.benchmarks.report import grids
from tests.benchmarks.scale import measure_scale
from tests.benchmarks.startup import measure_startup
from tests.benchmarks.sweeping import measure_sweeping
from tests.benchmarks.workshop import Workshop

SECTIONS: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    "operations": measure_operations,
    "callers": measure_callers,
    "sweeping": measure_sweeping,
    "scale": measure_scale,
    "startup": measure_startup,
    "postgresql": measure_postgresql,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works, not how fast")
    parser.add_argument(
        "--only", default="", help=f"a list of sections ({', '.join(SECTIONS)}) and works ({', '.join(NAMES)})"
    )
    parser.add_argument(
        "--contenders",
        help=f"a list of {', '.join(CONTESTANTS)}; or of your own, as path.to.module:Class. sqlite3 always takes part",
    )
    parser.add_argument("--rounds", type=int, help="how often each contender is started anew (3)")
    parser.add_argument("--rows", type=int, help="in each large table (10,000)")
    parser.add_argument(
        "--ten-million", action="store_true", help="scale up to 10 million rows: 20 GB, 10 minutes more"
    )
    parser.add_argument("--output", type=Path, help="a directory for the page, its charts and its figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and tell what came of it."""
    options = parse(arguments)
    console = Console()
    only = frozenset(filter(None, options.only.split(",")))
    if unknown := only.difference(SECTIONS, NAMES):
        raise BenchmarkError(f"there is no section or work called {', '.join(sorted(unknown))}")
    contestants, skipped = choose(options.contenders.split(",") if options.contenders else None)
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}")
    if options.quick:
        plan = Plan(rounds=options.rounds or 1, repeats=1, seconds=0.005)
    else:
        plan = Plan(rounds=options.rounds or 3)
    rows = options.rows or (400 if options.quick else 10_000)
    sizes = (200, 400) if options.quick else (10_000, 1_000_000, *((10_000_000,) if options.ten_million else ()))
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "quick": options.quick,
        "skipped": skipped,
        "versions": {each.name: each.version() for each in contestants},
    }
    with tempfile.TemporaryDirectory(prefix="homeagent-benchmarks-") as directory, console.status("") as status:
        workshop = Workshop(Path(directory), plan, contestants, rows, sizes, only, options.quick, status.update)
        for section, measure in SECTIONS.items():
            if not only or section in only or (section == "operations" and only.intersection(NAMES)):
                results[section] = measure(workshop)
    tables = grids(results)
    # The goals come last here, where the eye is when a run ends.
    for table in (*tables[1:], tables[0]):
        console.print(table.rich())
    if options.output is not None:
        for path in write_page(results, options.output):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
