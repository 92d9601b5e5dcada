"""Write the report: tables for the terminal and for docs/benchmarks.md, and the figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks.goals import ROWS, Figure, Row, judge
from tests.benchmarks.measuring import ROOT, BenchmarkError
from tests.benchmarks.operations import BASELINE, CONTENDERS

__all__ = ["describe_run", "goals_table", "terminal_line", "write"]

BEGIN, END = "<!-- measured: python -m tests.benchmarks --output docs -->", "<!-- end -->"
LIBRARIES = ("homeagent", "apsw", "sqlalchemy", "sqlmodel", "psycopg")


def describe_run(command: str) -> dict[str, str]:
    """Return the date, the command, the revision, the machine and the versions of a run."""
    versions = [f"Python {platform.python_version()}", f"sqlite3 with SQLite {sqlite3.sqlite_version}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = f". Other programs also ran (load average {load:.1f}), so the figures are rough" if load > 1 else ""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command,
        "revision": revision.strip() or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors{busy}",
        "versions": ", ".join(versions),
    }


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


def write(figures: Sequence[Figure], run: Mapping[str, str], page: Path) -> None:
    """Write the tables between the markers of a page, and the figures into a JSON file next to the page.

    Raises:
        BenchmarkError: if the page does not have both markers exactly once.
    """
    text = page.read_text(encoding="utf-8")
    told = (
        f"Measured {run['date']} at revision {run['revision']}, by `{run['command']}`.\n"
        f"The machine was {run['machine']}.\nThe versions were {run['versions']}."
    )
    parts = ["## Goals", goals_table(figures), "## Every contender", figures_table(figures)]
    made = "\n\n".join([BEGIN, told, *parts, END])
    text, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)
    if count != 1:
        raise BenchmarkError(f"{page.name} needs the line {BEGIN}, and later the line {END}, once each")
    page.write_text(text, encoding="utf-8")
    lines = ",\n  ".join(json.dumps(asdict(each), ensure_ascii=False) for each in figures)
    head = json.dumps(dict(run), indent=1, ensure_ascii=False).removesuffix("\n}")
    page.with_suffix(".json").write_text(f'{head},\n "figures": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
