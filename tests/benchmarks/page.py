"""The page of the documentation, its charts and the figures behind it, written anew by each run that is asked to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.charts import Bar, Panel, draw
from tests.benchmarks.contestants import BASELINE
from tests.benchmarks.report import Grid, grids, readable_time
from tests.benchmarks.sweeping import ALONE

__all__ = ["write_page"]

Results = Mapping[str, Any]

_INTRODUCTION = """\
# Benchmarks

Written by `python -m tests.benchmarks --ten-million --output docs`: all figures below come from one run of it. The
figures behind them are in [benchmarks.json](benchmarks/benchmarks.json). How to run it yourself is in
[CONTRIBUTING.md](../CONTRIBUTING.md).
"""

_QUICK = """\
**These figures are of a quick run, which shows that all works. They say nothing about speed.**
"""

_SECTIONS = {
    "goals": """\
## Goals

A ratio is to hand-written `sqlite3` that does the same in the same run, unless the row says otherwise. It is the median
of its samples; a goal is met where every value in its row keeps to it.
""",
    "operations": """\
## Every operation

Each contender runs in a process of its own, on a copy of one file, with the same pragmas. They take turns: a ratio is
of two samples that were taken side by side, and what is told is the median, the least and the greatest. A write is one
transaction (claim and complete are two), and so is a read. Each answer is checked: the right row, the right number, a
replay refused, a result equal to what was stored; and what was written is counted afterwards by another process.

- `sqlite3` is constant SQL on one connection, on the SQLite library that homeagent uses. It returns rows as the driver
  does: text and integers. homeagent returns model instances with instants, enums and decoded JSON.
- `sqlite3, autocommit` leaves BEGIN and COMMIT out around a read, the least that a single SELECT can cost.
- `sqlite3, objects` makes dataclasses with the same types of its rows, as most programs would next.
- The other libraries are used the way their documentation begins with. They get the same SQLite library, except apsw
  and better-sqlite3, which bring their own.
""",
    "callers": """\
## Many callers at once

Each caller consumes one nonce after the other, and each commit is on the disk before its caller goes on. What `run` and
`arun` gain comes from callers that share a commit. Without them, a caller is a thread with a `unit_of_work` of its own,
or a coroutine that hands one to a worker thread.
""",
    "sweeping": """\
## A writer beside a sweep

One writer consumes nonces as fast as it can, at `full`, while `Database.sweep` removes dead nonces and keys for half a
minute, or until none is left. A sweep of the same process has its turn after each unit of the writer. One of another
process competes for SQLite's lock with a writer that never pauses, and gets it when that writer happens to be between
two units: see how many rows it swept.
""",
    "scale": """\
## What size costs

Devices, sessions, nonces and idempotency keys, so many rows of each. A larger index has another level, and its pages
are further apart: what that costs SQLite itself shows in the hand-written column.
""",
    "startup": """\
## Starting

Whole processes, one after the other in turns. Alembic {alembic} imported when an up-to-date file is opened.
""",
    "postgresql": """\
## PostgreSQL

homeagent against hand-written psycopg: the same isolation, as many statements, prepared as psycopg does by default, on
PostgreSQL {server} over a local socket. At `normal`, `synchronous_commit` is off, so that what is left is the work.
""",
}


def write_page(results: Results, directory: Path) -> list[Path]:
    """Write benchmarks.md into a directory, the charts and the figures into benchmarks/ below it.

    Args:
        results: of one run.
        directory: made where it is absent.

    Returns:
        What was written.
    """
    beside = directory / "benchmarks"
    beside.mkdir(parents=True, exist_ok=True)
    figures = beside / "benchmarks.json"
    figures.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    charts = {name: (title, draw(title, panels, columns=columns)) for name, title, panels, columns in _charts(results)}
    written = [figures]
    for name, (_, picture) in charts.items():
        written.append(beside / f"{name}.svg")
        written[-1].write_text(picture, encoding="utf-8")
    page = directory / "benchmarks.md"
    page.write_text(_page(results, {name: title for name, (title, _) in charts.items()}), encoding="utf-8")
    return [page, *written]


def _page(results: Results, charts: Mapping[str, str]) -> str:
    parts = [_INTRODUCTION]
    if results["quick"]:
        parts.append(_QUICK)
    tables: dict[str, list[Grid]] = {}
    for grid in grids(results):
        tables.setdefault(grid.section, []).append(grid)
    for section, text in _SECTIONS.items():
        if section not in tables:
            continue
        values = {
            "alembic": "was" if results.get("startup", {}).get("alembic_imported") else "was not",
            "server": results.get("postgresql", {}).get("server"),
        }
        parts.append(text.format(**values))
        for name, title in charts.items():
            if name.startswith(section):
                parts.append(f"![{title}](benchmarks/{name}.svg)\n")
        for grid in tables[section]:
            heading = f"### {grid.title}\n\n" if len(tables[section]) > 1 or grid.title != "Goals" else ""
            parts.append(f"{heading}{grid.markdown()}\n")
    parts.append(_circumstances(results))
    return "\n".join(parts)


def _circumstances(results: Results) -> str:
    lines = ["## Measured on\n", "| what | which |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in {**results["machine"], **results["versions"]}.items()]
    if results["skipped"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    return {"homeagent": "ours", BASELINE: "baseline", "psycopg": "baseline"}.get(name, "other")


def _charts(results: Results) -> list[tuple[str, str, list[Panel], int]]:
    """Return name, title, panels and columns of each chart."""
    charts = []
    for section, engine in (("operations", "hand-written sqlite3"), ("postgresql", "hand-written psycopg")):
        for durability, measured in results.get(section, {}).get("measured", {}).items():
            titles = results[section]["titles"]
            panels = [
                Panel(
                    titles[work],
                    [
                        Bar(
                            name,
                            each["ratio"],
                            f"{each['ratio']:.2f} · {readable_time(each['seconds'])}",
                            _kind(name),
                        )
                        for name, each in sorted(row.items(), key=lambda item: item[1]["ratio"])
                    ],
                )
                for work, row in measured.items()
            ]
            charts.append(
                (
                    f"{section}-{durability}",
                    f"Time as a ratio to {engine}, at {durability}: shorter is better",
                    panels,
                    2,
                )
            )
    if "callers" in results:
        measured = results["callers"]["measured"]
        counts = next(iter(measured.values()))
        panels = [
            Panel(
                f"{count} caller{'' if count == '1' else 's'}: commits a second",
                [
                    Bar(way, row[count]["rate"], f"{row[count]['rate']:,.0f}", _way(way))
                    for way, row in measured.items()
                ],
            )
            for count in counts
        ]
        charts.append(("callers", "Durable commits a second: longer is better", panels, 2))
    if "sweeping" in results:
        measured = results["sweeping"]["measured"]
        panels = [
            Panel(
                f"a writer's {share}",
                [
                    Bar(mode, found[share], readable_time(found[share]), "baseline" if mode == ALONE else "ours")
                    for mode, found in measured.items()
                ],
            )
            for share in ("p50", "p99", "max")
        ]
        charts.append(("sweeping", "What a writer waits while dead rows are swept: shorter is better", panels, 1))
    if "scale" in results:
        section = results["scale"]
        largest = str(section["sizes"][-1])
        panels = [
            Panel(
                title,
                [
                    Bar(name, row[work][largest]["ratio"], f"{row[work][largest]['ratio']:.2f}", _kind(name))
                    for name, row in section["measured"].items()
                ],
            )
            for work, title in section["titles"].items()
        ]
        title = f"Cost with {int(largest):,} rows as a ratio to {section['sizes'][0]:,}: shorter is better"
        charts.append(("scale", title, panels, 2))
    return charts


def _way(way: str) -> str:
    return "ours" if way.startswith(("run", "arun")) else "other"
