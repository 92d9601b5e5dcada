"""The command `homeagent status`, which shows the state of the database."""

from __future__ import annotations

import typer

from homeagent.cli.application import app, open_named
from homeagent.cli.output import count, format_timestamp, print_facts, print_result, print_table
from homeagent.maintenance.status import DatabaseStatus


@app.command()
def status(context: typer.Context) -> None:
    """Show location, engine, schema, settings, file modes and number of rows of the database.

    The command does not create or upgrade a database.
    """
    with open_named(context) as opened:
        found = opened.status()
    print_result(context, found.model_dump(mode="json"), lambda: _print(found))


def _print(found: DatabaseStatus) -> None:
    print_facts(_summary(found).items())
    rows = [(name, number, found.expired.get(name)) for name, number in found.rows.items()]
    typer.echo()
    print_table(("Table", "Rows", "Expired, to be swept"), rows)
    # Do not show the counters, because a gateway's counters are only in the process of the gateway.
    for title, facts in (("Pragmas", found.pragmas), ("File modes", found.file_modes)):
        if facts:
            typer.echo("\n" + typer.style(title, bold=True))
            print_facts((name, str(value)) for name, value in facts.items())


def _summary(found: DatabaseStatus) -> dict[str, str]:
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}.get(found.engine, found.engine)
    engine = f"{name} {found.engine_version}, through {found.driver} {found.driver_version}"
    facts = {
        "Database": found.location,
        "Engine": engine,
        "Schema revision": str(found.schema_revision),
        **({} if found.application_revision is None else {"Application's revision": found.application_revision}),
    }
    if found.restored_at is not None:
        facts["Epoch"] = f"{found.epoch}, restored at {format_timestamp(found.restored_at)}"
    if found.durability is not None:
        facts["Durability"] = found.durability
    if found.wal_bytes is not None:
        facts["Write-ahead log"] = count(found.wal_bytes, "byte")
    return facts
