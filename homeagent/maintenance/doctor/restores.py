"""What restores left behind: one that was cut off, half a copy, databases that were kept aside."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path

from homeagent.engine.disk.files import look_at
from homeagent.engine.sqlite.presence import presence_path
from homeagent.engine.sqlite.swapping import aside_path, new_path
from homeagent.maintenance.doctor.chart import Chart
from homeagent.maintenance.doctor.disk import STALE, our_files

__all__ = ["KEPT", "check_restores"]

KEPT = timedelta(days=30)
"""After this long nobody is still looking at a database that a restore put aside."""


def check_restores(chart: Chart, path: Path) -> None:
    """Look for what restores left beside a database."""
    with chart.attempt("restores"):
        note = look_at(presence_path(path))
        if note is not None and note.st_size:
            chart.warn(
                "restores",
                "A restore was cut off, and waits to be finished.",
                meaning="whoever opens the database next finishes it first: it is the restored one from then on",
                remedy="open the database once",
                command=f"homeagent status --database {shlex.quote(str(path))}",
            )
            return
        kept = {file: now for file in our_files(path) if (now := _stamp(file, aside_path(path, "*"))) is not None}
        halves = [
            file
            for file in our_files(path)
            if (began := _stamp(file, new_path(path, "*"))) is not None and began < chart.now - STALE
        ]
        old = [file for file, aside_at in kept.items() if aside_at < chart.now - KEPT]
        if not halves and not old:
            chart.ok("restores", "Nothing of a restore waits to be removed.", kept=len(kept), old=0, halves=0)
            return
        chart.warn(
            "restores",
            f"{len(old)} files of databases that restores put aside over {KEPT.days} days ago, and {len(halves)} half "
            "copies of restores that were cut off.",
            meaning="they hold devices and hashes like the database itself, and take up space",
            remedy="look once more whether you need them, then remove them",
            command=f"rm {' '.join(shlex.quote(str(file)) for file in sorted([*old, *halves]))}",
            kept=len(kept),
            old=len(old),
            halves=len(halves),
        )


def _stamp(file: Path, pattern: Path) -> datetime | None:
    """Return the instant in the name of a file that a restore made, None for any other file."""
    before, _, after = pattern.name.partition("*")
    # SQLite's files beside it are kept under the same name.
    found = re.fullmatch(rf"{re.escape(before)}(\d{{8}}T\d{{12}}Z)(_\d+)?{re.escape(after)}(-\w+)?", file.name)
    return None if found is None else datetime.strptime(found[1], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC)
