"""The command `homeagent status`, which shows the state of the database."""

from __future__ import annotations

import typer

from homeagent.cli.application import DatabaseOption, app
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, count, facts_table, format_timestamp, grid, print_json
from homeagent.maintenance.status import DatabaseStatus


@app.command()
def status(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Show location, engine, schema, settings, file modes and number of rows of the database.

    The command does not create or upgrade a database.
    """
    with open_named(context, database) as opened:
        found = opened.status()
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    console = console_for()
    console.print(facts_table(_summary(found)))
    rows = grid(header=True)
    rows.add_column("Table")
    rows.add_column("Rows", justify="right")
    rows.add_column("Expired, to be swept", justify="right")
    for name, number in found.rows.items():
        rows.add_row(name, f"{number:,}", f"{found.expired[name]:,}" if name in found.expired else "")
    console.print()
    console.print(rows)
    # These counters belong to this process only. A gateway reads its own counters by `Database.counters()`.
    counters = {name: value for name, value in found.counters.model_dump(mode="json").items() if value is not None}
    sections = (("Pragmas", found.pragmas), ("File modes", found.file_modes), ("Counters of this command", counters))
    for title, facts in sections:
        if facts:
            console.print(f"\n{title}", style="bold")
            console.print(facts_table({name: str(value) for name, value in facts.items()}))


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
