"""The same operations on ten thousand, a million and ten million rows: what size costs, homeagent and by hand."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tests.benchmarks.contestants import BASELINE, CONTESTANTS, ContenderError, Contestant, Process
from tests.benchmarks.data import count_rows
from tests.benchmarks.measuring import Measured, Runner
from tests.benchmarks.operations import indexed
from tests.benchmarks.works import Work, works
from tests.benchmarks.workshop import Workshop

__all__ = ["measure_scale"]

DURABILITY = "normal"
"""Where no commit waits for the disk, what size costs shows most."""

NAMES = (BASELINE, "homeagent")
HUGE = 10_000_000
"""From so many rows on copies take longer than samples: one round with more samples, and not two with fewer."""


def _expect_at_least(name: str, size: int, found: dict[str, int], written: Counter[str]) -> None:
    # The checks write some rows too.
    for table, count in written.items():
        if found[table] < size + count:
            raise ContenderError(name, f"with {size:,} rows: {count} more of {table} were written, and {found} found")


def measure_scale(workshop: Workshop) -> dict[str, Any]:
    """Return what was measured by contender, piece of work and size, and its ratio to the smallest size.

    A sample of each size is taken beside one of the smallest. What is there after each round is kept.
    """
    sizes = sorted(workshop.sizes)
    chosen = works(indexed(workshop))
    table = {name: {work: {size: Measured() for size in sizes} for work in chosen} for name in NAMES}
    rounds, repeats = (1, 5) if sizes[-1] >= HUGE else (2, 3)
    plan = replace(workshop.plan, rounds=min(workshop.plan.rounds, rounds), repeats=min(workshop.plan.repeats, repeats))

    def results() -> dict[str, Any]:
        return {
            "rounds": plan.rounds,
            "sizes": sizes,
            "titles": {work.name: work.title for work in chosen.values()},
            "measured": {
                name: {work: {str(size): each.summary() for size, each in row.items()} for work, row in by_work.items()}
                for name, by_work in table.items()
            },
        }

    for number in range(plan.rounds):
        for name in NAMES:
            copied = ", ".join(f"{size:,}" for size in sizes)
            workshop.say(f"round {number + 1} of {plan.rounds}: {name}, copies of {copied} rows")
            _measure_sizes(replace(workshop, plan=plan), CONTESTANTS[name], number, list(chosen.values()), table[name])
        workshop.keep(results())
    return results()


def _measure_sizes(
    workshop: Workshop,
    contestant: Contestant,
    number: int,
    chosen: Sequence[Work],
    table: dict[str, dict[int, Measured]],
) -> None:
    sizes = sorted(workshop.sizes)
    paths = {size: workshop.fresh(size) for size in sizes}
    written: dict[int, Counter[str]] = {size: Counter() for size in sizes}
    # What the copies left to be written must not be in the way of what is measured.
    os.sync()
    with ExitStack() as stack:
        runners = {
            size: Runner(
                contestant,
                stack.enter_context(Process(contestant, str(path), DURABILITY)),
                workshop.template(size)[1],
            )
            for size, path in paths.items()
        }
        for work in chosen:
            workshop.say(f"round {number + 1} of {workshop.plan.rounds}: {contestant.name}, {work.title}")
            for runner in runners.values():
                work.check(runner.process, runner.rows)
                runner.begin(work, workshop.plan, number)
            for repeat in range(workshop.plan.repeats):
                times = {size: runner.sample(work, repeat, number) for size, runner in runners.items()}
                for size, time in times.items():
                    table[work.name][size].add(time, times[sizes[0]])
            for size, runner in runners.items():
                written[size].update(runner.written)
    # Counted only now: to count ten million rows is to read them, and would empty the caches in between.
    for size, path in paths.items():
        _expect_at_least(contestant.name, size, count_rows(path), written[size])
        shutil.rmtree(path.parent)
