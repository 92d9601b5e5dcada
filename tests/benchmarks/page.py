"""The page of the documentation, its charts and the figures behind it, written anew by each run that is asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from tests.benchmarks.charts import draw
from tests.benchmarks.machine import is_busy, told_load
from tests.benchmarks.pictures import pictures
from tests.benchmarks.report import Grid, grids
from tests.benchmarks.results import SECTIONS, failures, write_atomically

__all__ = ["write_page"]

Results = Mapping[str, Any]

_QUICK = """\
**These figures are of a quick run, which shows that all works. They say nothing about speed.**
"""

_SECTIONS = {
    "goals": """\
## Goals

A ratio is to hand-written `sqlite3` that does the same in the same run, unless the row says otherwise. It is the median
of its samples; the least and the greatest of them are in brackets, of a lone caller the bounds of eight blocks in ten.
A goal is met where every median in its row keeps to it; the longest wait is that of all samples. Where the limit lies
between the brackets, another run may say otherwise.
""",
    "operations": """\
## Every operation

Each contender runs in a process of its own, on a copy of one file, with the same pragmas. They take turns: a ratio is
of two samples that were taken side by side, and what is told is the median, the least and the greatest. The slow make
fewer calls in a sample, so that it takes about as long of everybody. A write is one transaction (claim and complete are
two), and so is a read. Each answer is checked: the right row, the right number, a replay refused, a result equal to
what was stored; and what was written is counted afterwards by another process.

- `sqlite3` is constant SQL on one connection, on the SQLite library that homeagent uses. It returns rows as the driver
  does: text and integers. homeagent returns model instances with instants, enums and decoded JSON.
- `sqlite3, autocommit` leaves BEGIN and COMMIT out around a read, the least that a single SELECT can cost.
- `sqlite3, objects` makes dataclasses with the same types of its rows, as most programs would next.
- The other libraries are used the way their documentation begins with. They get the same SQLite library, except apsw
  and better-sqlite3, which bring their own.
- Another library lives through the trace for ten seconds at most. Where that isn't all of it, it is compared with the
  time that `sqlite3` takes for as many events.
""",
    "layers": """\
## Where the time goes

homeagent from below, at `normal`, a layer more in each column, in processes that take turns: what a column adds to the
one before it is what that layer costs.

- *statement and link*: parameters are converted, rows become models, the transaction begins and ends.
- *unit of work*: a lane is taken and given back, the thread's own units are told apart, the unit is counted.
- *store*: ids, texts, limits and durations are checked, the clock is read, JSON is checked and encoded, the nonces of a
  device are counted.

*cold* is what homeagent takes beyond `sqlite3` where each of them first reads a megabyte of other memory, as another
program does while a commit waits for the disk: the more memory a call touches, the more of it has to come back.
""",
    "callers": """\
## Many callers at once

Each caller consumes one nonce after the other, and each commit is on the disk before its caller goes on. What `run` and
`arun` gain comes from callers that share a commit. Without them, a caller is a thread with a `unit_of_work` of its own,
or a coroutine that hands one to a worker thread.
""",
    "sweeping": """\
## A writer beside a sweep

One writer consumes nonces as fast as it can, at `full`, while `Database.sweep` removes dead nonces and keys for
{sweeping:g} seconds, each time on a fresh copy. The figures are medians of {turns} turns; the longest wait is that of
all. A sweep that finds the writer waiting, or has to wait for it, rests for four times as long as it held the lane.
One of another process competes for SQLite's lock with a writer that never pauses, and gets it when it happens to try
between two units: see how many rows each swept.
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
    """Write benchmarks.md into a directory, and its charts into benchmarks/ below it, where the figures are.

    Args:
        results: of one run or several, each section with its own.
        directory: made where it is absent.

    Returns:
        What was written.
    """
    beside = directory / "benchmarks"
    charts = {name: (title, draw(title, panels, columns=columns)) for name, title, panels, columns in pictures(results)}
    written = []
    for name, (_, picture) in charts.items():
        written.append(beside / f"{name}.svg")
        write_atomically(written[-1], picture)
    for left in beside.glob("*.svg"):
        # Of figures that are there no more.
        if left not in written:
            left.unlink()
    page = directory / "benchmarks.md"
    write_atomically(page, _page(results, {name: title for name, (title, _) in charts.items()}))
    return [page, *written]


def _page(results: Results, charts: Mapping[str, str]) -> str:
    parts = [_introduction(results)]
    if results["quick"]:
        parts.append(_QUICK)
    tables: dict[str, list[Grid]] = {}
    for grid in grids(results):
        tables.setdefault(grid.section, []).append(grid)
    sweeping = results.get("sweeping", {})
    values = {
        "alembic": "was" if results.get("startup", {}).get("alembic_imported") else "was not",
        "server": results.get("postgresql", {}).get("server"),
        "sweeping": sweeping.get("seconds", 0),
        "turns": len(sweeping["measured"]["alone"]["samples"]) if "measured" in sweeping else 0,
    }
    for section, text in _SECTIONS.items():
        run = results.get(section, {}).get("run")
        if section not in tables and run is None:
            continue
        parts.append(text.format(**values))
        if run is not None:
            parts.append(told_run(run))
        for name, title in charts.items():
            if name.startswith(section):
                parts.append(f"![{title}](benchmarks/{name}.svg)\n")
        for grid in tables.get(section, []):
            heading = f"### {grid.title}\n\n" if len(tables[section]) > 1 or grid.title != "Goals" else ""
            parts.append(f"{heading}{grid.markdown()}\n")
    parts.append(_circumstances(results))
    return "\n".join(parts)


def _introduction(results: Results) -> str:
    runs = [results[section]["run"] for section in SECTIONS if section in results]
    commands = list(dict.fromkeys(run["command"] for run in runs))
    lines = ["# Benchmarks\n"]
    if len(commands) == 1:
        lines.append(f"Written by `{commands[0]}`.")
    else:
        lines.append("Written by these commands, in the order of the sections:\n")
        lines += [f"- `{command}`" for command in commands]
        lines.append("")
    if len({(run.get("revision"), run.get("changed")) for run in runs}) > 1:
        lines.append("**The sections are not all of the same state of the code**, as each of them tells.")
    lines.append(
        "Each section tells when and how it was measured. The figures behind it are in\n"
        "[benchmarks.json](benchmarks/benchmarks.json). How to run it yourself is in\n"
        "[CONTRIBUTING.md](../CONTRIBUTING.md).\n"
    )
    if failed := failures(dict(results)):
        lines.append("These failed:\n")
        lines += [f"- {what}: {kind}" for what, kind in failed.items()]
        lines.append("")
    return "\n".join(lines)


def told_run(run: Mapping[str, Any]) -> str:
    """Return when, how and in what circumstances a section was measured."""
    revision = f"at revision {run['revision']}" if "revision" in run else "outside of a checkout"
    if run.get("changed"):
        revision += " with changes that are not committed"
    rounds = f"{run['rounds']} round{'' if run['rounds'] == 1 else 's'}"
    told = (
        f"Measured {run['date']}, homeagent {run['version']}, {revision}, in {rounds} and "
        f"{run['seconds'] / 60:.1f} minutes, by `{run['command']}`. {_told_load(run['busy'])}"
    )
    lines = [fill(told, 120, break_long_words=False, break_on_hyphens=False) + "\n"]
    if "failed" in run:
        lines.append(f"**It failed before its end: {run['failed']}.**\n")
    elif not run["complete"]:
        lines.append("**It was ended before its end: there are fewer samples than were meant to be.**\n")
    return "\n".join(lines)


def _told_load(busy: Sequence[float | None]) -> str:
    when = "before and after it" if len(busy) > 1 else "before it"
    warning = " **That is not quiet: look at the least and the greatest.**" if is_busy(busy) else ""
    return f"Share of the processors that others used {when}: {told_load(busy)}.{warning}"


def _circumstances(results: Results) -> str:
    versions = {**results["versions"], **results.get("postgresql", {}).get("versions", {})}
    lines = ["## Measured on\n", "| what | which |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in {**results["machine"], **versions}.items()]
    skipped = {
        name: reason
        for section in SECTIONS
        for name, reason in results.get(section, {"run": {"skipped": {}}})["run"]["skipped"].items()
    }
    if skipped:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in skipped.items()]
    return "\n".join(lines) + "\n"
