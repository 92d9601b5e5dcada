"""What every section of the benchmarks is given: how much to measure, who takes part, and room to work in."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import Contestant
from tests.benchmarks.data import Rows, make_database
from tests.benchmarks.measuring import Plan, copy_database

__all__ = ["DURABILITIES", "Workshop"]

DURABILITIES = ("full", "normal")


@dataclass
class Workshop:
    """One run of the benchmarks.

    Attributes:
        directory: where the databases are made; removed at the end.
        plan: how many samples are taken, and how long they are.
        contestants: who takes part, the baseline first.
        rows: how many rows each large table holds, where a section doesn't say otherwise.
        sizes: the numbers of rows that the section on scale compares.
        only: names of sections and of pieces of work; empty for all.
        quick: whether a figure is only to be seen, and not to be believed.
        say: is told what is being done.
        warn: is told what must not be missed.
        keep: is given what a section has found so far.
    """

    directory: Path
    plan: Plan
    contestants: Sequence[Contestant]
    rows: int
    sizes: Sequence[int]
    only: frozenset[str]
    quick: bool
    say: Callable[[str], object]
    warn: Callable[[str], object]
    keep: Callable[[dict[str, Any]], object] = lambda results: None
    _templates: dict[int, tuple[Path, Rows]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def template(self, rows: int) -> tuple[Path, Rows]:
        """Return a database with so many rows in each large table, made when it is first asked for."""
        if rows not in self._templates:
            self.say(f"filling a database with {rows:,} rows in each table")
            path = self.directory / f"template-{rows}" / "homeagent.db"
            self._templates[rows] = path, make_database(path, rows)
        return self._templates[rows]

    def fresh(self, rows: int) -> Path:
        """Return a copy of such a database that nobody else uses."""
        return copy_database(self.template(rows)[0], self.room())

    def clear(self) -> None:
        """Remove all copies, which nobody uses any more."""
        for copy in self.directory.glob("copy-*"):
            shutil.rmtree(copy)

    def room(self) -> Path:
        """Return the path of a directory that is still to be made."""
        return self.directory / f"copy-{next(self._numbers)}"
