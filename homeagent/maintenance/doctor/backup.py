"""How old the newest backup is."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path

from homeagent.engine.sqlite.manifests import newest_backup, read_manifest
from homeagent.maintenance.doctor.chart import Chart

__all__ = ["OLD", "check_backup"]

OLD = timedelta(days=7)
"""A backup that is older than this is too old."""


def check_backup(chart: Chart, path: Path) -> None:
    """Look for the newest backup that is known beside the database, without opening it."""
    with chart.attempt("backup"):
        backup = newest_backup(path)
        manifest = None if backup is None else read_manifest(backup, path)
        if backup is None or manifest is None:
            # There may be one elsewhere, made by other means: nothing is known, which is no fault.
            chart.ok("backup", "No backup is known here: 'homeagent backup' makes one.", age_seconds=None)
            return
        database = shlex.quote(str(path))
        chart.restore_command = f"homeagent restore {shlex.quote(str(backup))} --database {database}"
        age = chart.now - manifest.taken_at
        facts = {"age_seconds": round(age.total_seconds(), 3)}
        if age <= OLD:
            chart.ok(
                "backup", f"The newest backup is {str(backup)!r}, of {manifest.taken_at:%Y-%m-%d %H:%M} UTC.", **facts
            )
            return
        chart.warn(
            "backup",
            f"The newest backup is {age.days} days old: {str(backup)!r}.",
            meaning="what happened since would be lost with the file: revocations and used nonces too",
            remedy="make one, and have the gateway or a timer make them from now on",
            command=f"homeagent backup --database {database}",
            age_seconds=facts["age_seconds"],
        )
