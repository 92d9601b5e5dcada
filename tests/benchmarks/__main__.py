"""Measure homeagent against hand-written SQL and other libraries: python -m tests.benchmarks --help."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.benchmarks import callers, operations, postgresql, processes
from tests.benchmarks.goals import ROWS, judge
from tests.benchmarks.measuring import QUICK, Bench, BenchmarkError, Sizes
from tests.benchmarks.report import goals_table, merge, terminal_line, versions
from tests.figures import describe_run, load, save

MEASURES = (operations.measure, callers.measure, processes.measure, postgresql.measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure homeagent. The exit status is 1 if a goal is not met or a contender fails.",
    )
    parser.add_argument("--only", metavar="TEXT", action="append", default=[], help="rows whose names contain TEXT")
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each contender in each row")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: show that every row works, judge no goal")
    parser.add_argument("--list", action="store_true", help="print the rows and their goals, measure nothing")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="update the rows in FILE: docs/figures.json")
    return parser


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.list:
        _say(goals_table([]))
        return 0
    if options.figures is not None and options.quick:
        parser.error("--quick measures no time, so leave --figures out")
    if not any(text in row.name for text in options.only or [""] for row in ROWS):
        parser.error(f"no row contains {' or '.join(options.only)}: see --list")
    sizes = QUICK if options.quick else Sizes()
    if options.rounds is not None:
        sizes = replace(sizes, rounds=options.rounds, few_rounds=options.rounds)
    run = {**describe_run(shlex.join(["python", "-m", "tests.benchmarks", *given])), "versions": versions()}
    names = operations.installed()
    for name in operations.CONTENDERS:
        if name not in names:
            sys.stderr.write(f"{name} is not installed and is left out\n")
    with tempfile.TemporaryDirectory(prefix="homeagent-benchmarks-") as directory:
        bench = Bench(Path(directory), sizes, names, options.only, lambda figure: _say(terminal_line(figure)))
        try:
            for measure in MEASURES:
                measure(bench)
            if options.figures is not None:
                content = load(options.figures)
                merge(content, run, bench.figures)
                save(options.figures, content)
        except BenchmarkError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    if options.quick:
        return 0
    _say(goals_table(bench.figures))
    return int(any(verdict.met is False for verdict in judge(bench.figures)))


if __name__ == "__main__":
    sys.exit(main())
