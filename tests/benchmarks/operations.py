"""The operations, one transaction each, and the recorded trace: every contender, at both durabilities."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measuring import Contest
from tests.benchmarks.trace import TraceContest
from tests.benchmarks.works import INDEXED, works
from tests.benchmarks.workshop import DURABILITIES, Workshop

__all__ = ["NAMES", "indexed", "measure_operations"]

TRACE = "trace"
QUICK_INDEXED = 500
QUICK_EVENTS = 200

NAMES = (*works(), TRACE)
"""What `--only` may name of this section."""


def indexed(workshop: Workshop) -> int:
    """Return how many sessions are indexed at once."""
    return QUICK_INDEXED if workshop.quick else INDEXED


def measure_operations(workshop: Workshop) -> dict[str, Any]:
    """Return what was measured by durability, piece of work and contender; and the titles of the works.

    What is there after each round is kept, in case that the next one doesn't end.

    Raises:
        ContenderError: the baseline failed.
    """
    every = works(indexed(workshop))
    chosen = [name for name in NAMES if not workshop.only.intersection(NAMES) or name in workshop.only]
    _, rows = workshop.template(workshop.rows)
    contests = {
        durability: Contest(
            workshop.plan,
            workshop.contestants,
            [every[name] for name in chosen if name != TRACE],
            rows,
            durability,
            lambda each: str(workshop.fresh(workshop.rows)),
            workshop.say,
            workshop.warn,
        )
        for durability in DURABILITIES
    }
    traces = {
        durability: TraceContest(
            [each for each in workshop.contestants if each.takes_part(TRACE)],
            durability,
            lambda each: str(workshop.fresh(0)),
            workshop.say,
            workshop.warn,
            QUICK_EVENTS if workshop.quick else None,
        )
        for durability in (DURABILITIES if TRACE in chosen else ())
    }

    def results() -> dict[str, Any]:
        measured = {durability: contest.summary() for durability, contest in contests.items()}
        for durability, trace in traces.items():
            if row := trace.summary():
                measured[durability][TRACE] = row
        return {
            "titles": {**{work.name: work.title for work in every.values()}, TRACE: "the trace, per event"},
            "rows": workshop.rows,
            "measured": {durability: table for durability, table in measured.items() if table},
        }

    for number in range(workshop.plan.rounds):
        for contest in contests.values():
            contest.measure_round(number)
            workshop.keep(results())
            workshop.clear()
    for number in range(workshop.plan.pairs):
        for trace in traces.values():
            trace.measure_round(number)
            workshop.keep(results())
            workshop.clear()
    return results()
