"""How fast is it, against the others and against its goals?

All of a section is measured in one run, the contenders taking turns, each in a process of its own. What is measured is
written after each round: a run that is ended leaves what it has, and a later one goes on with `--missing`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.callers import measure_callers
from tests.benchmarks.contestants import CONTESTANTS, BenchmarkError, ContenderError, Contestant, choose
from tests.benchmarks.layers import measure_layers
from tests.benchmarks.machine import busy_share, describe_code, describe_machine, told_command
from tests.benchmarks.measuring import Plan
from tests.benchmarks.operations import NAMES, measure_operations
from tests.benchmarks.page import write_page
from tests.benchmarks.postgresql import measure_postgresql
from tests.benchmarks.progress import Progress
from tests.benchmarks.report import grids
from tests.benchmarks.results import SECTIONS, failures, finished, join_results, read_results, write_results
from tests.benchmarks.scale import measure_scale
from tests.benchmarks.startup import measure_startup
from tests.benchmarks.sweeping import measure_sweeping
from tests.benchmarks.workshop import Workshop

MEASURES: dict[str, Callable[[Workshop], dict[str, Any]]] = dict(
    zip(
        SECTIONS,
        (
            measure_operations,
            measure_layers,
            measure_callers,
            measure_sweeping,
            measure_scale,
            measure_startup,
            measure_postgresql,
        ),
        strict=True,
    )
)


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
        "--ten-million", action="store_true", help="scale up to 10 million rows: 25 GB, 10 minutes more"
    )
    parser.add_argument("--output", type=Path, help="a directory for the page, its charts and its figures")
    parser.add_argument(
        "--missing", action="store_true", help="only the sections that the output does not hold to their end"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: write the page anew from the output's figures"
    )
    options = parser.parse_args(arguments)
    options.only = frozenset(filter(None, options.only.split(",")))
    if (options.missing or options.render) and options.output is None:
        parser.error("--missing and --render need --output")
    return options


@dataclass
class Run:
    """One run of the command: what it is told, and where its figures go.

    Attributes:
        results: of all sections, earlier runs' included.
        command: what the page says it was.
        output: the page's directory, None for no page.
        skipped: why who doesn't take part.
        failed: whether a section did not come to its end.
    """

    results: dict[str, Any]
    command: str
    output: Path | None
    skipped: Mapping[str, str]
    failed: bool = False

    def measure(self, section: str, workshop: Workshop, progress: Progress) -> None:
        """Measure a section, and write what is there after each of its rounds; its failure doesn't stop the others."""
        earlier = self.results.get(section)
        pause = 0.1 if workshop.quick else 2.0
        progress.begin(section)
        record: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": self.command,
            **describe_code(),
            "skipped": self.skipped,
            "busy": [busy_share(pause)],
            "complete": False,
        }
        begun = time.monotonic()

        def keep(found: dict[str, Any], **more: Any) -> None:
            record["seconds"] = round(time.monotonic() - begun, 1)
            record["rounds"] = found.get("rounds", workshop.plan.rounds)
            record.update(more)
            # What is whole is not given up for what may not become it.
            if record["complete"] or not finished(earlier):
                self.results[section] = {"run": dict(record), **found}
                self.write()

        found: dict[str, Any] = {}

        def keep_so_far(so_far: dict[str, Any]) -> None:
            found.update(so_far)
            keep(found)

        try:
            found = MEASURES[section](replace(workshop, keep=keep_so_far))
        except Exception as error:  # noqa: BLE001  it is printed, told on the page and by the exit status
            if not isinstance(error, BenchmarkError):
                traceback.print_exc()
            progress.warn(f"{section} failed: {error} (the others go on)")
            self.failed = True
            keep(found, failed=error.kind if isinstance(error, ContenderError) else type(error).__name__)
        else:
            record["busy"].append(busy_share(pause))
            keep(found, complete=True)

    def write(self) -> None:
        """Write the figures."""
        if self.output is not None:
            write_results(self.results, figures_in(self.output))

    def write_page(self, console: Console) -> None:
        """Write the page and its charts."""
        if self.output is not None and any(section in self.results for section in SECTIONS):
            for path in write_page(self.results, self.output):
                console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def figures_in(directory: Path) -> Path:
    """Return where the figures of a page are."""
    return directory / "benchmarks" / "benchmarks.json"


def take_versions(contestants: Sequence[Contestant], warn: Callable[[str], object]) -> dict[str, str]:
    """Return the versions of who can be imported; the others will fail at each piece of work."""
    versions = {}
    for each in contestants:
        try:
            versions[each.name] = each.version()
        except ContenderError as error:
            warn(str(error))
    return versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and tell what came of it; return the exit status."""
    options = parse(arguments)
    console = Console()
    if unknown := options.only.difference(SECTIONS, NAMES):
        raise BenchmarkError(f"there is no section or work called {', '.join(sorted(unknown))}")
    earlier = None if options.output is None else read_results(figures_in(options.output))
    if options.render:
        if earlier is None:
            raise BenchmarkError(f"there are no figures in {options.output}: measure first")
        Run(earlier, "", options.output, {}).write_page(console)
        return 0
    contestants, skipped = choose(options.contenders.split(",") if options.contenders else None)
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}")
    sections = [
        section
        for section in SECTIONS
        if (not options.only or section in options.only or (section == "operations" and options.only & set(NAMES)))
        and not (options.missing and earlier and finished(earlier.get(section)))
    ]
    if earlier and "operations" in earlier and options.only & set(NAMES):
        raise BenchmarkError("the output holds operations already: measure some works alone without --output")
    progress = Progress(sections)
    present = {
        "machine": describe_machine(),
        "quick": options.quick,
        "versions": take_versions(contestants, progress.warn),
    }
    if options.output is not None:
        present = join_results(earlier, present, figures_in(options.output))
    given = sys.argv[1:] if arguments is None else arguments
    run = Run(present, told_command("tests.benchmarks", given), options.output, skipped)
    try:
        with tempfile.TemporaryDirectory(prefix="homeagent-benchmarks-") as directory, progress:
            workshop = Workshop(
                Path(directory),
                Plan(rounds=options.rounds or 1, repeats=1, pairs=1, seconds=0.005, peer_seconds=0.005)
                if options.quick
                else Plan(rounds=options.rounds or 3),
                contestants,
                options.rows or (400 if options.quick else 10_000),
                (200, 400) if options.quick else (10_000, 1_000_000, *((10_000_000,) if options.ten_million else ())),
                options.only,
                options.quick,
                progress.say,
                progress.warn,
            )
            for section in sections:
                run.measure(section, workshop, progress)
    finally:
        run.write_page(console)
    tables = grids(run.results)
    # The goals come last here, where the eye is when a run ends.
    for table in (*tables[1:], tables[0]):
        console.print(table.rich())
    failed = failures({section: run.results[section] for section in sections if section in run.results})
    for what, kind in failed.items():
        progress.warn(f"failed: {what}: {kind}")
    return 1 if failed or run.failed else 0


if __name__ == "__main__":
    # Ended either way, it removes what it made and writes the page of what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks: interrupted; --missing goes on with what is left")
