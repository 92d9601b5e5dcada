"""When is SQLite outgrown, and what does PostgreSQL cost? Measures both on this machine.

    python -m tests.benchmarks.scaling --output scaling.json --page docs/scaling.md

The figures go to a file as JSON after each section, to standard output as tables, and into a page in the place of those
that are there. A later run with the same file measures some of them anew (`--only`), and leaves the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from homeagent.engine.sqlite.driver import choose_driver

from tests.benchmarks.contestants import BenchmarkError
from tests.benchmarks.machine import busy_share, describe_code, told_command
from tests.benchmarks.progress import Progress
from tests.benchmarks.results import read_json, write_atomically
from tests.benchmarks.scaling.hosts import measure_host
from tests.benchmarks.scaling.moving import measure_copies
from tests.benchmarks.scaling.operations import measure_operations
from tests.benchmarks.scaling.partitions import measure_outgrown, measure_partitions
from tests.benchmarks.scaling.stores import Place, open_place
from tests.benchmarks.scaling.tables import replace_tables, tell
from tests.benchmarks.scaling.writers import measure_writers

Section = Callable[[Place], dict[str, Any]]

FULL: dict[str, Section] = {
    "operations": lambda place: measure_operations(place, sizes=[10_000, 1_000_000], seconds=0.4, rounds=5),
    "writers": lambda place: measure_writers(place, processes=[1, 2, 4, 8, 16], seconds=4, rows=10_000),
    "host": lambda place: measure_host(place, messages=20_000),
    "copies": lambda place: measure_copies(place, sizes=[100_000, 1_000_000]),
    "partitions": lambda place: measure_partitions(place, rows=1_000_000),
    "outgrown": lambda place: measure_outgrown(place, rows=500_000),
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
    parser.add_argument("--rows", type=int, help="how many nonces the simulations get (1,000,000; 500,000)")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced, each between its two marks")
    parser.add_argument("--postgresql-bin", type=Path, help="where the server's programs are; else the wheel's")
    options = parser.parse_args(arguments)
    options.only = list(filter(None, options.only.split(","))) or list(FULL)
    if unknown := set(options.only) - set(FULL):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and tell what came of it; return the exit status."""
    options = parse(arguments)
    sections = dict(QUICK if options.quick else FULL)
    if options.rows is not None:
        sections["partitions"] = lambda place: measure_partitions(place, rows=options.rows)
        sections["outgrown"] = lambda place: measure_outgrown(place, rows=options.rows)
    given = sys.argv[1:] if arguments is None else arguments
    record = {"command": told_command("tests.benchmarks.scaling", given), **describe_code()}
    pause = 0.1 if options.quick else 3.0
    # Neither with a server of ours, whose own business would count as somebody else's.
    busy = [busy_share(pause)]
    with Progress(options.only) as progress:
        with open_place(options.postgresql_bin) as place:
            results = _begin(options, _machine(place))
            failed = []
            for name in options.only:
                if not _measure(name, sections[name], place, results, record, progress):
                    failed.append(name)
                # After each, so that a run that is ended early has left something.
                _write(options, results)
        busy.append(busy_share(pause))
    for name in options.only:
        if name not in failed:
            results["runs"][name]["busy"] = busy
    _write(options, results)
    told = tell(results)
    sys.stdout.write("\n\n".join(told.values()) + "\n")
    if options.page is not None:
        write_atomically(options.page, replace_tables(options.page.read_text(encoding="utf-8"), told))
    return 1 if failed else 0


def _begin(options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what the output holds already, where it is of this machine and these sizes."""
    kind = {"machine": machine, "quick": options.quick}
    earlier = None if options.output is None else read_json(options.output)
    if earlier is None:
        return {**kind, "runs": {}}
    if {name: earlier.get(name) for name in kind} != kind or "runs" not in earlier:
        raise BenchmarkError(
            f"{options.output} is of another machine, another version or other sizes: "
            "name another --output, or move the file away"
        )
    return earlier


def _measure(
    name: str,
    section: Section,
    place: Place,
    results: dict[str, Any],
    record: dict[str, Any],
    progress: Progress,
) -> bool:
    """Measure one section, and return whether that went well; where it didn't, what was there before stays."""
    progress.begin(name)
    progress.say("measuring")
    date, begun = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), time.monotonic()
    try:
        figures = section(place)
    except Exception as error:  # noqa: BLE001  it is printed, and the exit status tells it
        traceback.print_exc()
        progress.warn(f"{name} failed: {error} (the others go on)")
        return False
    results[name] = figures
    results["runs"][name] = {**record, "date": date, "seconds": round(time.monotonic() - begun), "busy": []}
    return True


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


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
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"scaling: {error}")
