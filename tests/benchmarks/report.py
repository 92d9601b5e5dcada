"""What was measured, as tables: for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import sub
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks import layers
from tests.benchmarks.contestants import BASELINE
from tests.benchmarks.goals import judge

__all__ = ["Grid", "grids", "readable_time"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """A table; its first columns are text, the others are figures.

    Attributes:
        section: where it belongs; tables of one section stand together.
        title: what it shows.
        header: the names of its columns.
        rows: its cells.
        texts: how many columns are text.
    """

    section: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1

    def markdown(self) -> str:
        """Return it for a page."""
        rule = ["---" if number < self.texts else "--:" for number in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def rich(self) -> Table:
        """Return it for a terminal."""
        table = Table(title=self.title)
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number < self.texts else "right")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
        return table


def readable_time(seconds: float) -> str:
    """Return a duration with three figures and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def spread(figures: Mapping[str, Any]) -> str:
    """Return a ratio with the least and the greatest of its samples."""
    return f"{figures['ratio']:.2f} ({figures['ratio_min']:.2f}–{figures['ratio_max']:.2f})"


def grids(results: Results) -> list[Grid]:
    """Return every table that these results can fill, the goals first."""
    tables = _goals(results)
    for section, make in _MAKERS.items():
        # A section that failed from the first has nothing but its run.
        if "measured" in results.get(section, {}):
            tables += make(results[section])
    return tables


def _goals(results: Results) -> list[Grid]:
    rows = []
    for verdict in judge(results):
        told = f"**{verdict.verdict()}**" if verdict.met is False else verdict.verdict()
        rows.append([verdict.goal.work, verdict.goal.text(), verdict.measured(), told])
    return [Grid("goals", "Goals", ("work", "goal", "measured", ""), rows, texts=4)]


def _works(section: Mapping[str, Any], name: str, engine: str) -> list[Grid]:
    tables = []
    for durability, measured in section["measured"].items():
        rows = []
        for work, row in measured.items():
            for number, (contender, figures) in enumerate(row.items()):
                shown = [
                    "" if number else section["titles"][work],
                    f"**{contender}**" if contender == "homeagent" else contender,
                ]
                if "failed" in figures:
                    rows.append([*shown, f"failed: {figures['failed']}", "–", "–", "–"])
                    continue
                if figures.get("events") != figures.get("of_events"):
                    shown[1] += f", first {figures['events']:,} of {figures['of_events']:,}"
                rows.append(
                    [
                        *shown,
                        readable_time(figures["seconds"]),
                        spread(figures),
                        str(len(figures["samples"]["ratios"])),
                        "–" if figures["ratio_cpu"] is None else f"{figures['ratio_cpu']:.2f}",
                    ]
                )
        header = ("work", "contender", "a call", "ratio (min–max)", "samples", "ratio of CPU time")
        tables.append(Grid(name, f"{engine}, at `{durability}`", header, rows, texts=2))
    return tables


def _layers(section: Mapping[str, Any]) -> list[Grid]:
    ladder = (BASELINE, layers.LINK, layers.UNIT, "homeagent")
    differences = (*pairwise(ladder), (BASELINE, "homeagent"), (layers.COLD_BASELINE, layers.COLD))
    rows = []
    for work, row in section["measured"][layers.DURABILITY].items():
        if any("failed" in each for each in row.values()):
            continue
        samples = {name: each["samples"]["seconds"] for name, each in row.items()}
        # Of samples that were taken side by side, so that what else the machine did falls on both.
        added = [median(map(sub, samples[above], samples[below])) for below, above in differences]
        told = (row[BASELINE]["seconds"], *added)
        rows.append([section["titles"][work], *(f"{seconds * 1e6:.1f}" for seconds in told)])
    header = ("work", "by hand", "statement and link", "unit of work", "store", "all three", "all three, cold")
    return [Grid("layers", "Microseconds of a call, and what each layer adds to it", header, rows)]


def _callers(section: Mapping[str, Any]) -> list[Grid]:
    rows = []
    for way, row in section["measured"].items():
        for number, (count, figures) in enumerate(row.items()):
            rows.append(
                [
                    "" if number else way,
                    count,
                    f"{figures['rate']:,.0f}",
                    f"{figures['rate_min']:,.0f}–{figures['rate_max']:,.0f}",
                    readable_time(figures["p50"]),
                    readable_time(figures["p99"]),
                ]
            )
    header = ("way", "callers", "commits a second", "min–max", "p50 of a call", "p99 of a call")
    lone = [
        [
            durability,
            readable_time(found["unit_of_work"]),
            readable_time(found["run"]),
            f"{found['ratio']:.2f} ({found['ratio_p10']:.2f}–{found['ratio_p90']:.2f})",
        ]
        for durability, found in section["lone"].items()
    ]
    return [
        Grid("callers", "Durable commits a second, at `full`", header, rows),
        Grid("callers", "One caller alone", ("durability", "`unit_of_work`", "`run`", "ratio (p10–p90)"), lone),
    ]


def _sweeping(section: Mapping[str, Any]) -> list[Grid]:
    rows = [
        [
            mode,
            f"{found['rate']:,.0f}",
            readable_time(found["p50"]),
            readable_time(found["p99"]),
            readable_time(found["max"]),
            spread(found),
            f"{found['swept']:,.0f}" if found["swept"] else "–",
        ]
        for mode, found in section["measured"].items()
    ]
    header = (
        "the writer is",
        "units a second",
        "p50",
        "p99",
        "longest",
        "p99 as a ratio (min–max)",
        "rows swept a second",
    )
    return [Grid("sweeping", f"A writer, beside a sweep of {section['dead']:,} dead rows", header, rows)]


def _scale(section: Mapping[str, Any]) -> list[Grid]:
    smallest, *larger = [str(size) for size in section["sizes"]]
    samples = len(next(iter(section["measured"]["homeagent"].values()))[smallest]["samples"]["ratios"])
    rows = []
    for work, title in section["titles"].items():
        for number, (name, measured) in enumerate(section["measured"].items()):
            sizes = measured[work]
            rows.append(
                [
                    "" if number else title,
                    f"**{name}**" if name == "homeagent" else name,
                    readable_time(sizes[smallest]["seconds"]),
                    *(f"{readable_time(sizes[size]['seconds'])}: {spread(sizes[size])}" for size in larger),
                ]
            )
    header = ("work", "contender", f"{int(smallest):,} rows", *(f"{int(size):,}: ratio (min–max)" for size in larger))
    return [
        Grid("scale", f"By the rows in each large table, at `normal`, {samples} samples of each", header, rows, texts=2)
    ]


def _startup(section: Mapping[str, Any]) -> list[Grid]:
    rows = [
        [name, readable_time(found["seconds"]), spread(found), readable_time(found["cpu"]), f"{found['ratio_cpu']:.2f}"]
        for name, found in section["measured"].items()
    ]
    header = ("program", "on the clock", "ratio (min–max)", "CPU time", "ratio of CPU time")
    return [Grid("startup", "A whole process", header, rows)]


_MAKERS: dict[str, Callable[[Mapping[str, Any]], list[Grid]]] = {
    "operations": lambda section: _works(section, "operations", "SQLite"),
    "layers": _layers,
    "callers": _callers,
    "sweeping": _sweeping,
    "scale": _scale,
    "startup": _startup,
    "postgresql": lambda section: _works(section, "postgresql", "PostgreSQL"),
}
