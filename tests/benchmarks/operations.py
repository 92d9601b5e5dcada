"""The operations, one transaction each, and the recorded trace: every contender, at both durabilities."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measuring import measure_works
from tests.benchmarks.trace import measure_trace
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
    """Return what was measured by durability, piece of work and contender; and the titles of the works."""
    every = works(indexed(workshop))
    chosen = [name for name in NAMES if not workshop.only.intersection(NAMES) or name in workshop.only]
    _, rows = workshop.template(workshop.rows)
    events = QUICK_EVENTS if workshop.quick else None
    measured: dict[str, Any] = {}
    for durability in DURABILITIES:
        table = measure_works(
            workshop.plan,
            workshop.contestants,
            [every[name] for name in chosen if name != TRACE],
            rows,
            durability,
            lambda each: str(workshop.fresh(workshop.rows)),
            workshop.say,
        )
        if TRACE in chosen:
            table[TRACE] = measure_trace(
                workshop.plan.rounds,
                [each for each in workshop.contestants if each.takes_part(TRACE)],
                durability,
                lambda each: str(workshop.fresh(0)),
                workshop.say,
                events,
            )
        measured[durability] = {
            work: {name: each.summary() for name, each in row.items()} for work, row in table.items()
        }
    titles = {work.name: work.title for work in every.values()}
    return {"titles": {**titles, TRACE: "the trace, per event"}, "rows": workshop.rows, "measured": measured}
