"""When is SQLite outgrown, and what does PostgreSQL cost? Measures both on this machine.

    python -m tests.benchmarks.scaling --output scaling.json --page docs/scaling.md

The figures go to a file as JSON, to standard output as tables, and into a page in the place of those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from homeagent.engine.sqlite.driver import choose_driver
from tests.benchmarks.scaling.hosts import measure_host
from tests.benchmarks.scaling.moving import measure_copies
from tests.benchmarks.scaling.operations import measure_operations
from tests.benchmarks.scaling.partitions import measure_outgrown, measure_partitions
from tests.benchmarks.scaling.stores import Place, open_place
from tests.benchmarks.scaling.tables import TABLES, replace_tables
from tests.benchmarks.scaling.writers import measure_writers

Section = Callable[[Place], dict[str, Any]]

FULL: dict[str, Section] = {
    "operations": lambda place: measure_operations(place, sizes=[10_000, 1_000_000], seconds=0.4, rounds=5),
    "writers": lambda place: measure_writers(place, processes=[1, 2, 4, 8, 16], seconds=4, rows=10_000),
    "host": lambda place: measure_host(place, messages=20_000),
    "copies": lambda place: measure_copies(place, sizes=[100_000, 1_000_000]),
    "partitions": lambda place: measure_partitions(place, rows=2_000_000),
    "outgrown": lambda place: measure_outgrown(place, rows=1_000_000),
}
QUICK: dict[str, Section] = {
    "operations": lambda place: measure_operations(place, sizes=[200], seconds=0.02, rounds=1),
    "writers": lambda place: measure_writers(place, processes=[2], seconds=0.2, rows=100),
    "host": lambda place: measure_host(place, messages=100),
    "copies": lambda place: measure_copies(place, sizes=[2_000]),
    "partitions": lambda place: measure_partitions(place, rows=24_000),
    "outgrown": lambda place: measure_outgrown(place, rows=24_000),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works, not how fast")
    parser.add_argument("--only", default="", help=f"a list of {', '.join(FULL)}; left out, all")
    parser.add_argument("--rows", type=int, help="how many nonces the simulations get (2,000,000; 1,000,000)")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced, each between its two marks")
    parser.add_argument("--postgresql-bin", type=Path, help="where the server's programs are; else the wheel's")
    options = parser.parse_args(arguments)
    options.only = list(filter(None, options.only.split(","))) or list(FULL)
    if unknown := set(options.only) - set(FULL):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and tell what came of it."""
    options = parse(arguments)
    sections = dict(QUICK if options.quick else FULL)
    if options.rows is not None:
        sections["partitions"] = lambda place: measure_partitions(place, rows=options.rows)
        sections["outgrown"] = lambda place: measure_outgrown(place, rows=options.rows)
    say = Console(stderr=True, highlight=False)
    results: dict[str, Any] = {}
    with open_place(options.postgresql_bin) as place:
        results["machine"] = _machine(place)
        for name in options.only:
            say.print(f"measuring: {name}")
            results[name] = sections[name](place)
            # After each, so that a run that is ended early has left something.
            if options.output is not None:
                options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    told = {name: TABLES[name](figures) for name, figures in results.items()}
    sys.stdout.write("\n\n".join(told.values()) + "\n")
    if options.page is not None:
        page = replace_tables(options.page.read_text(encoding="utf-8"), told)
        options.page.write_text(page, encoding="utf-8")


def _machine(place: Place) -> dict[str, Any]:
    ((version,),) = place.server.execute("SHOW server_version")
    ((synced,),) = place.server.execute("SHOW synchronous_commit")
    ((buffers,),) = place.server.execute("SHOW shared_buffers")
    return {
        "system": platform.system(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": choose_driver().version_text,
        "postgresql": version,
        "synchronous_commit": synced,
        "shared_buffers": buffers,
    }


if __name__ == "__main__":
    main()
