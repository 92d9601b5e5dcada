"""Write the tables for the terminal, and docs/benchmarks.md: python -m tests.benchmarks.report [--check]."""

from __future__ import annotations

import platform
import re
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tests.benchmarks.goals import ROWS, Figure, Row, judge
from tests.benchmarks.measuring import ROOT, BenchmarkError
from tests.benchmarks.operations import BASELINE, CONTENDERS
from tests.figures import FIGURES, load

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- generated: python -m tests.benchmarks.report -->", "<!-- end -->"
CAMPAIGNS = """\
A campaign is a long test that kills processes, damages files or generates calls. A campaign fails if a row is lost,
repeated or wrong. The table shows only campaigns that passed."""
LIBRARIES = ("homeagent", "apsw", "sqlalchemy", "sqlmodel", "psycopg")


def versions() -> str:
    """Return the versions of Python, SQLite and the measured libraries."""
    found = [f"Python {platform.python_version()}", f"sqlite3 with SQLite {sqlite3.sqlite_version}"]
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _value(figure: Figure, row: Row) -> str:
    """Return a time or a rate as text."""
    if row.at_least:
        return f"{figure.value:,.0f}/s"
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if figure.value * factor < 1_000:
            return f"{figure.value * factor:.3g} {unit}"
    return f"{figure.value:.3g} s"


def terminal_line(figure: Figure) -> str:
    """Return a figure as one line of text."""
    row = next(row for row in ROWS if row.name == figure.row)
    return f"{figure.row:40} {figure.durability:6} {figure.contender:15} {_value(figure, row):>10}  {figure.ratio}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def goals_table(figures: Sequence[Figure]) -> str:
    """Return the table of goals in Markdown, for the page and the terminal."""
    rows = []
    for verdict in judge(figures):
        measured = ", ".join(
            f"{each.ratio} ({each.durability})" if each.durability else each.ratio for each in verdict.figures
        )
        rows.append([verdict.row.name, verdict.row.against, verdict.row.goal, measured, verdict.text])
    return _table(["work", "compared with", "goal", "median ratio [least–greatest]", "result"], rows)


def figures_table(figures: Sequence[Figure]) -> str:
    """Return the table of the rows that also measure other libraries. Each contender has a column."""
    others = [name for name in CONTENDERS if name != BASELINE]
    lines = []
    for row in ROWS:
        found = [each for each in figures if each.row == row.name]
        for durability in dict.fromkeys(each.durability for each in found):
            baseline, *rest = (each for each in found if each.durability == durability)
            cells: Mapping[str, Figure] = {each.contender: each for each in rest}
            if not cells.keys() - {"homeagent"}:
                continue
            line = [row.name, durability, _value(baseline, row)]
            line += [f"{_value(cells[name], row)}, {cells[name].ratio}" if name in cells else "" for name in others]
            lines.append(line)
    return _table(["work", "durability", "baseline", *others], lines)


def chart(row: str, durability: str, title: str, figures: Sequence[Figure]) -> str:
    """Return a section with a block that `.ci/site.py` draws as a bar chart."""
    found = [each for each in figures if (each.row, each.durability) == (row, durability)]
    if not found:
        return ""
    rate = next(each for each in ROWS if each.name == row).at_least
    unit, better = ("operations per second", "longer") if rate else ("microseconds", "shorter")
    width = max(len(each.contender) for each in found)
    bars = (f"{each.contender:<{width}}  {each.value * (1 if rate else 1e6):,.4g}" for each in found)
    block = "\n".join(["```chart", f"accTitle: {title}, in {unit}", *bars, "```"])
    return f"### {title}\n\nEach bar shows {unit}. A {better} bar is better.\n\n{block}"


CHARTS = (
    ("find a device by id, in a unit", "", "Find a device by id"),
    ("nonce consume", "normal", 'Consume a nonce with durability "normal"'),
    ("durable commits of 256 asyncio callers", "full", "Durable commits of 256 callers"),
)


def merge(content: dict[str, Any], run: Mapping[str, str], figures: Sequence[Figure]) -> None:
    """Put the figures of a run into the content of docs/figures.json, in place of earlier figures of the same rows."""
    measured = {figure.row for figure in figures}
    for earlier in content["benchmarks"]:
        earlier["figures"] = [figure for figure in earlier["figures"] if figure["row"] not in measured]
    runs = [{**run, "figures": [asdict(each) for each in figures]}, *content["benchmarks"]]
    content["benchmarks"] = [each for each in runs if each["figures"]]


def _describe(run: Mapping[str, Any], alone: bool) -> str:
    rows = dict.fromkeys(figure["row"] for figure in run["figures"])
    what = "Every row was" if alone else f"The rows {', '.join(f'“{row}”' for row in rows)} were"
    return (
        f"{what} measured on {run['date']} at revision {run['revision']}, by `{run['command']}`.\n"
        f"The machine was {run['machine']}.\nThe versions were {run['versions']}."
    )


def campaigns_table(campaigns: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table of the campaigns in Markdown."""
    rows = [
        [name, each["result"], f"{each['date'].partition(' ')[0]}, {each['revision']}", f"`{each['command']}`"]
        for name, each in sorted(campaigns.items())
    ]
    return _table(["what the tests did or measured", "result", "date and revision", "command"], rows)


def page(text: str, content: Mapping[str, Any]) -> str:
    """Return the text of docs/benchmarks.md with the figures between its markers.

    Raises:
        BenchmarkError: if the page does not have both markers exactly once.
    """
    runs = content["benchmarks"]
    figures = [Figure(**figure) for run in runs for figure in run["figures"]]
    parts = [_describe(run, len(runs) == 1) for run in runs]
    parts += ["## Goals", goals_table(figures), "## Charts"]
    parts += filter(None, (chart(*each, figures) for each in CHARTS))
    parts += ["## Every contender", figures_table(figures)]
    if content["campaigns"]:
        parts += ["## Campaigns", CAMPAIGNS, campaigns_table(content["campaigns"])]
    made = "\n\n".join([BEGIN, *parts, END])
    text, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)
    if count != 1:
        raise BenchmarkError(f"the page needs the line {BEGIN}, and later the line {END}, once each")
    return text


def main(arguments: Sequence[str]) -> int:
    """Write docs/benchmarks.md, or compare the page with the figures if `--check` is given. Return the exit status."""
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, load(FIGURES))
    if "--check" not in arguments:
        PAGE.write_text(new, encoding="utf-8")
    elif old != new:
        sys.stderr.write("docs/benchmarks.md differs from docs/figures.json: run python -m tests.benchmarks.report\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
