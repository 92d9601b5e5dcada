"""The same operations on ten thousand, a million and ten million rows: what size costs, homeagent and by hand."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.contestants import BASELINE, CONTESTANTS, BenchmarkError, Process
from tests.benchmarks.data import count_rows
from tests.benchmarks.measuring import Measured, Runner
from tests.benchmarks.operations import indexed
from tests.benchmarks.works import works
from tests.benchmarks.workshop import Workshop

__all__ = ["measure_scale"]

DURABILITY = "normal"
"""Where no commit waits for the disk, what size costs shows most."""


def _expect_at_least(name: str, size: int, found: dict[str, int], written: Counter[str]) -> None:
    # The checks write some rows too.
    for table, count in written.items():
        if found[table] < size + count:
            raise BenchmarkError(f"{name} with {size:,} rows: {count} more of {table} were written, and {found} found")


def measure_scale(workshop: Workshop) -> dict[str, Any]:
    """Return what was measured by contender, piece of work and size, and its ratio to the smallest size."""
    sizes = sorted(workshop.sizes)
    chosen = works(indexed(workshop))
    names = (BASELINE, "homeagent")
    table = {name: {work: {size: Measured() for size in sizes} for work in chosen} for name in names}
    rounds = min(workshop.plan.rounds, 2)
    for number in range(rounds):
        for name in names:
            paths = {size: workshop.fresh(size) for size in sizes}
            written: dict[int, Counter[str]] = {size: Counter() for size in sizes}
            # What the copies left to be written must not be in the way of what is measured.
            os.sync()
            with ExitStack() as stack:
                runners = {
                    size: Runner(
                        stack.enter_context(Process(CONTESTANTS[name], str(path), DURABILITY)),
                        workshop.template(size)[1],
                    )
                    for size, path in paths.items()
                }
                for work in chosen.values():
                    workshop.say(f"scale, round {number + 1} of {rounds}: {name}, {work.title}")
                    for runner in runners.values():
                        work.check(runner.process, runner.rows)
                        runner.begin(work, workshop.plan, number)
                    for repeat in range(workshop.plan.repeats):
                        times = {size: runner.sample(work, repeat, number) for size, runner in runners.items()}
                        for size, (seconds, cpu) in times.items():
                            measured = table[name][work.name][size]
                            measured.seconds.append(seconds)
                            measured.cpu.append(cpu)
                            measured.ratios.append(seconds / times[sizes[0]][0])
                    for size, runner in runners.items():
                        written[size].update(runner.written)
            # Counted only now: to count ten million rows is to read them, and would empty the caches in between.
            for size, path in paths.items():
                _expect_at_least(name, size, count_rows(path), written[size])
                shutil.rmtree(path.parent)
    return {
        "sizes": sizes,
        "titles": {work.name: work.title for work in chosen.values()},
        "measured": {
            name: {work: {str(size): each.summary() for size, each in row.items()} for work, row in table[name].items()}
            for name in names
        },
    }
