"""What the package sets out to reach, and whether this run reached it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import callers, startup, sweeping

__all__ = ["GOALS", "Goal", "Verdict", "judge"]

Results = Mapping[str, Any]
Figures = dict[str, float]
"""Measured values by what they were measured at, such as a durability."""


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        work: what is measured.
        limit: the value that must not be passed.
        measure: finds the values in the results; KeyError where they were not measured.
        least: whether the limit is the least that is wanted, and not the most.
        unit: what follows the numbers.
    """

    work: str
    limit: float
    measure: Callable[[Results], Figures]
    least: bool = False
    unit: str = ""

    def text(self) -> str:
        """Return the goal as it is told."""
        return f"{'≥' if self.least else '≤'} {self.limit:g}{self.unit}"


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured; `met` is None where it was not measured."""

    goal: Goal
    figures: Figures
    met: bool | None

    def measured(self) -> str:
        """Return the values as they are told."""
        return ", ".join(
            f"{value:.2f}{self.goal.unit}" + (f" ({where})" if where else "") for where, value in self.figures.items()
        )

    def verdict(self) -> str:
        """Return `met`, `not met` or `not measured`."""
        return "not measured" if self.met is None else "met" if self.met else "not met"


def _operation(work: str) -> Callable[[Results], Figures]:
    return lambda results: {
        durability: measured[work]["homeagent"]["ratio"]
        for durability, measured in results["operations"]["measured"].items()
    }


def _callers(count: int, way: str, alone: str) -> Callable[[Results], Figures]:
    def measure(results: Results) -> Figures:
        measured = results["callers"]["measured"]
        return {"": measured[way][str(count)]["rate"] / measured[alone][str(count)]["rate"]}

    return measure


def _lone(results: Results) -> Figures:
    return {durability: found["ratio"] for durability, found in results["callers"]["lone"].items()}


def _waits(share: str) -> Callable[[Results], Figures]:
    def measure(results: Results) -> Figures:
        measured = results["sweeping"]["measured"]
        alone = measured[sweeping.ALONE]
        scale = 1000 if share == "max" else 1 / alone[share]
        return {mode: measured[mode][share] * scale for mode in sweeping.MODES if mode != sweeping.ALONE}

    return measure


def _scale(results: Results) -> Figures:
    largest = results["scale"]["sizes"][-1]
    if largest < 10_000_000:
        raise KeyError(largest)
    measured = results["scale"]["measured"]["homeagent"]
    return {results["scale"]["titles"][work]: row[str(largest)]["ratio"] for work, row in measured.items()}


def _startup(results: Results) -> Figures:
    return {"": results["startup"]["measured"][startup.HOMEAGENT]["ratio"]}


def _alembic(results: Results) -> Figures:
    return {"": float(results["startup"]["alembic_imported"])}


def _postgresql(results: Results) -> Figures:
    section = results["postgresql"]
    return {
        f"{section['titles'][work]}, {durability}": row["homeagent"]["ratio"]
        for durability, measured in section["measured"].items()
        for work, row in measured.items()
    }


GOALS = (
    Goal("device by id, a model instance against bare rows", 2.0, _operation("device")),
    Goal("idempotency find, a model instance against bare rows", 2.0, _operation("find_key")),
    Goal("50 sessions of an agent, as models, against bare rows", 1.6, _operation("agent_sessions")),
    Goal("last-seen write, one unit", 1.15, _operation("seen")),
    Goal("nonce consume, one unit", 1.15, _operation("consume")),
    Goal("idempotency insert, one unit", 1.15, _operation("insert_key")),
    Goal("index of 10,000 sessions as models, against `executemany` of ready tuples", 2.0, _operation("index")),
    Goal(
        "durable commits a second, 256 asyncio callers through `arun`, against one commit per caller",
        6.0,
        _callers(256, callers.ARUN, callers.UNITS_ASYNC),
        least=True,
    ),
    Goal(
        "durable commits a second, 64 threads through `run`, against one commit per caller",
        2.5,
        _callers(64, callers.RUN, callers.UNITS),
        least=True,
    ),
    Goal("a lone caller through `run`, against `unit_of_work`", 1.1, _lone),
    Goal("a writer's p99 while a million dead rows are swept, against alone", 25.0, _waits("p99")),
    Goal("a writer's longest wait meanwhile", 50.0, _waits("max"), unit=" ms"),
    Goal("cost at 10 million rows, against 10 thousand", 1.5, _scale),
    Goal("`import homeagent` and open an up-to-date file, against `import sqlmodel`", 1.25, _startup),
    Goal("Alembic imported by that (1 is yes)", 0.0, _alembic),
    Goal("each operation on PostgreSQL, against hand-written psycopg", 1.3, _postgresql),
)


def judge(results: Results) -> list[Verdict]:
    """Return each goal with what was measured; it is met where every value keeps to the limit."""
    verdicts = []
    for goal in GOALS:
        try:
            figures = goal.measure(results)
        except KeyError:
            verdicts.append(Verdict(goal, {}, None))
            continue
        kept = [value >= goal.limit if goal.least else value <= goal.limit for value in figures.values()]
        verdicts.append(Verdict(goal, figures, all(kept)))
    return verdicts
