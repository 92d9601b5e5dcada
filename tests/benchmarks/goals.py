"""What the package sets out to reach, and whether this run reached it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import callers, startup, sweeping

__all__ = ["GOALS", "Goal", "Verdict", "judge"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """The median of some samples, which a goal is judged by, and the least and the greatest of them.

    Where there is one value and no samples, all three are that.
    """

    value: float
    least: float
    greatest: float

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Figure:
        """Return a ratio as it stands in the results."""
        return cls(found["ratio"], found["ratio_min"], found["ratio_max"])

    @classmethod
    def single(cls, value: float) -> Figure:
        """Return a value without samples."""
        return cls(value, value, value)

    def text(self, unit: str) -> str:
        """Return it as it is told: with its samples, where they are others."""
        told = f"{self.value:.2f}{unit}"
        return told if self.least == self.greatest else f"{told} [{self.least:.2f}–{self.greatest:.2f}]"


Figures = dict[str, Figure]
"""What was measured by what it was measured at, such as a durability."""


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        work: what is measured.
        limit: the value that no median may pass.
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
        """Return the values as they are told: of many, those that come closest to the limit or pass it most."""
        figures, worst = list(self.figures.items()), ""
        if len(figures) > 4:
            figures = sorted(figures, key=lambda item: item[1].value, reverse=not self.goal.least)[:3]
            worst = "at worst "
        told = (figure.text(self.goal.unit) + (f" ({where})" if where else "") for where, figure in figures)
        return worst + ", ".join(told)

    def verdict(self) -> str:
        """Return `met`, `not met` or `not measured`."""
        return "not measured" if self.met is None else "met" if self.met else "not met"


def _operation(work: str) -> Callable[[Results], Figures]:
    return lambda results: {
        durability: Figure.of(measured[work]["homeagent"])
        for durability, measured in results["operations"]["measured"].items()
    }


def _callers(comparison: str) -> Callable[[Results], Figures]:
    return lambda results: {"": Figure.of(results["callers"]["compared"][comparison])}


def _lone(results: Results) -> Figures:
    # One in ten blocks meets something else on any machine: their bounds are told, and not the extremes.
    return {
        durability: Figure(found["ratio"], found["ratio_p10"], found["ratio_p90"])
        for durability, found in results["callers"]["lone"].items()
    }


def _waits(figure: Callable[[Mapping[str, Any]], Figure]) -> Callable[[Results], Figures]:
    return lambda results: {
        mode: figure(results["sweeping"]["measured"][mode]) for mode in sweeping.MODES if mode != sweeping.ALONE
    }


def _scale(results: Results) -> Figures:
    largest = results["scale"]["sizes"][-1]
    if largest < 10_000_000:
        raise KeyError(largest)
    measured = results["scale"]["measured"]["homeagent"]
    return {results["scale"]["titles"][work]: Figure.of(row[str(largest)]) for work, row in measured.items()}


def _startup(results: Results) -> Figures:
    return {"": Figure.of(results["startup"]["measured"][startup.HOMEAGENT])}


def _alembic(results: Results) -> Figures:
    return {"": Figure.single(float(results["startup"]["alembic_imported"]))}


def _postgresql(results: Results) -> Figures:
    section = results["postgresql"]
    return {
        f"{section['titles'][work]}, {durability}": Figure.of(row["homeagent"])
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
        _callers(callers.compared(256, callers.ARUN)),
        least=True,
    ),
    Goal(
        "durable commits a second, 64 threads through `run`, against one commit per caller",
        2.5,
        _callers(callers.compared(64, callers.RUN)),
        least=True,
    ),
    Goal("a lone caller through `run`, against `unit_of_work`", 1.1, _lone),
    Goal("a writer's p99 while a million dead rows are swept, against alone", 25.0, _waits(Figure.of)),
    Goal(
        "a writer's longest wait meanwhile", 50.0, _waits(lambda found: Figure.single(found["max"] * 1000)), unit=" ms"
    ),
    Goal("cost at 10 million rows, against 10 thousand", 1.5, _scale),
    Goal("`import homeagent` and open an up-to-date file, against `import sqlmodel`", 1.25, _startup),
    Goal("Alembic imported by that (1 is yes)", 0.0, _alembic),
    Goal("each operation on PostgreSQL, against hand-written psycopg", 1.3, _postgresql),
)


def judge(results: Results) -> list[Verdict]:
    """Return each goal with what was measured; it is met where every median keeps to the limit."""
    verdicts = []
    for goal in GOALS:
        try:
            figures = goal.measure(results)
        except KeyError:
            figures = {}
        kept = [figure.value >= goal.limit if goal.least else figure.value <= goal.limit for figure in figures.values()]
        verdicts.append(Verdict(goal, figures, all(kept) if kept else None))
    return verdicts
