"""Report how the schema of a database differs from what homeagent's revisions make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from homeagent.maintenance.doctor.chart import Chart
from homeagent.migrations.schema_drift import schema_differences
from homeagent.models import metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["check_schema"]


def check_schema(chart: Chart, connection: Connection) -> None:
    """Compare the tables of a database at this version's revision with the models."""
    with chart.attempt("schema", on=connection):
        differences = schema_differences(connection)
        if not differences:
            chart.ok("schema", f"The {len(metadata.tables)} tables are as the models say.", differences=0)
            return
        grave = [difference for difference in differences if difference.grave]
        first = (grave or differences)[0]
        remedy = "undo the change" if first.command is None else f"undo the change; the first step is: {first.command}"
        shown = "; ".join(difference.text for difference in differences[:10])
        summary = f"The schema was changed by hand: {shown}{'; …' if len(differences) > 10 else ''}."
        if grave:
            chart.alarm(
                "schema",
                summary,
                meaning="what the package relies on is not there: it may fail, or accept what it must refuse",
                remedy=remedy,
                differences=len(differences),
            )
        else:
            chart.warn(
                "schema",
                summary,
                meaning="it works, perhaps slowly; the next upgrade may fail or lose what was added",
                remedy=remedy,
                differences=len(differences),
            )
