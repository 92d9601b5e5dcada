"""Which revision the schema has, and whether this version of the package works with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from homeagent.maintenance.doctor.chart import RESTORE, Chart
from homeagent.migrations import REVISION, VERSION_TABLE, revision_of
from homeagent.models import store_table

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["check_revision"]


def check_revision(chart: Chart, connection: Connection) -> bool:
    """Look at the revision, and return whether the tables can be compared with the models."""
    with chart.attempt("schema_revision", on=connection):
        revision = revision_of(connection)
        if revision == REVISION:
            chart.ok("schema_revision", f"The schema is at revision {revision}.", revision=revision, needed=REVISION)
            return True
        if revision is None:
            chart.alarm(
                "schema_revision",
                f"There is no schema: no table {VERSION_TABLE}.",
                meaning="it was never made, or it was lost",
                remedy=f"where there was one: {RESTORE}; else make it",
                command="homeagent init",
                revision=None,
                needed=REVISION,
            )
        elif revision < REVISION:
            chart.warn(
                "schema_revision",
                f"The schema is at revision {revision}, and this version needs {REVISION}.",
                meaning="the gateway upgrades it when it opens it; what only looks at it refuses it until then",
                remedy="upgrade it; a file is copied beside itself first",
                command="homeagent migrate",
                revision=revision,
                needed=REVISION,
            )
        else:
            _tell_newer(chart, connection, revision)
    chart.skip("the schema is at another revision than the models", "schema")
    return False


def _tell_newer(chart: Chart, connection: Connection, revision: str) -> None:
    column = store_table.c.oldest_revision
    oldest = connection.execute(select(column)).scalar()
    if oldest is not None and oldest <= REVISION:
        chart.ok(
            "schema_revision",
            f"The schema is at revision {revision}, which works with versions from {oldest} on.",
            revision=revision,
            needed=REVISION,
        )
        return
    chart.alarm(
        "schema_revision",
        f"The schema is at revision {revision}, and this version knows {REVISION} at most.",
        meaning="a newer version upgraded it; this one refuses it, for it can't know what it would break",
        remedy="install the newer version again, or restore the backup that was made before the upgrade",
        command="pip install --upgrade homeagent",
        revision=revision,
        needed=REVISION,
    )
