"""Check the schema and the application's own tables, and distinguish the application's objects from damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from homeagent.maintenance.doctor.report import Collector, Severity
from homeagent.migrations.revisions import count_rows, own_tables, stored_revisions
from homeagent.migrations.schema_drift import Difference, schema_differences
from homeagent.models import APPLICATION_VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection

# Meaning and remedy for each kind of object of the application.
_OBJECTS = {
    "trigger": (
        "the trigger runs at writes to homeagent's tables; a copy, a restore and an upgrade refuse the trigger",
        "if the trigger is the application's, open the database with acknowledged={names!r} (on the command line: "
        "--acknowledge); otherwise {command}",
    ),
    "view": (
        "an upgrade that rebuilds the table fails while the view exists",
        "if an upgrade fails, drop the view ({command}), upgrade, and create the view again",
    ),
    "index": ("each write also changes the index", "if no query needs the index, drop the index: {command}"),
}


def check_schema(collector: Collector, connection: Connection) -> None:
    """Compare the schema with homeagent's revisions."""
    differences = schema_differences(connection)
    accepted = [difference for difference in differences if difference.trigger in collector.acknowledged]
    remaining = [difference for difference in differences if difference not in accepted]
    _report_changes(collector, [difference for difference in remaining if difference.kind is None])
    for kind, (meaning, remedy) in _OBJECTS.items():
        found = [difference for difference in remaining if difference.kind == kind]
        facts = {f"application_{'indexes' if kind == 'index' else kind + 's'}": len(found)}
        if found:
            names = [difference.trigger for difference in found]
            collector.warn(
                "schema",
                f"The application uses homeagent's tables: {_shown(found)}.",
                meaning,
                remedy.format(names=names, command=found[0].command),
                **facts,
            )
    if accepted:
        listed = ", ".join(str(difference.trigger) for difference in accepted)
        # Also report the triggers as a fact, because another finding can replace the summary.
        collector.ok("schema", f"Acknowledged triggers of the application: {listed}.", acknowledged=listed)


def _report_changes(collector: Collector, differences: Sequence[Difference]) -> None:
    if not differences:
        collector.ok("schema", "The schema is the same as homeagent's revisions create.", differences=0)
        return
    grave = [difference for difference in differences if difference.grave]
    command = (grave or differences)[0].command
    remedy = "undo the change" if command is None else f"undo the change; the first step is: {command}"
    triggers = [difference.trigger for difference in differences if difference.trigger is not None]
    if triggers:
        remedy += f"; if a trigger is the application's, open the database with acknowledged={triggers!r} instead"
    collector.add(
        Severity.CRITICAL if grave else Severity.WARNING,
        "schema",
        f"The schema was changed by hand: {_shown(differences)}.",
        "homeagent relies on the schema: it may fail, or accept what it must refuse"
        if grave
        else "homeagent works, perhaps slowly; the next upgrade may fail or lose what was added",
        remedy,
        differences=len(differences),
    )


def _shown(differences: Sequence[Difference]) -> str:
    shown = "; ".join(difference.text for difference in differences[:10])
    return f"{shown}{'; …' if len(differences) > 10 else ''}"


def check_application(collector: Collector, connection: Connection) -> None:
    """Name the application's tables, and count their rows."""
    rows = count_rows(connection, own_tables(connection))
    revision = ", ".join(sorted(stored_revisions(connection, APPLICATION_VERSION_TABLE))) or None
    shown = ", ".join(f"{name} (rows: {number:,})" for name, number in rows.items())
    place = "" if revision is None else f" at revision {revision}"
    summary = f"Tables of the application{place}: {shown or 'none'}."
    collector.ok("application", summary, revision=revision, tables=len(rows), rows=sum(rows.values()))


def report_orphans(collector: Collector, broken: Counter[tuple[str, str]]) -> None:
    """Report rows of the application's tables that refer to a missing row."""
    if not broken:
        return
    shown = "; ".join(f"from {child} to {parent}: {rows:,}" for (child, parent), rows in sorted(broken.items()))
    child = min(broken)[0].replace('"', '""')
    collector.warn(
        "application",
        f"Rows of the application that refer to a row that does not exist: {shown}.",
        "another program wrote to the table, or a revision rebuilt the table, without foreign keys; the file is not "
        "damaged, and a backup can't restore these rows",
        f'list the rows by: PRAGMA foreign_key_check("{child}"); then correct or delete the rows',
        orphans=broken.total(),
    )
