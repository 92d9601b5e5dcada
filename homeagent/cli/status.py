"""Commands that show the database (`homeagent status`) and the settings (`homeagent config`)."""

from __future__ import annotations

import os
import sys
from datetime import datetime

import typer

from homeagent.cli.application import app, open_named
from homeagent.cli.arguments import Format, FormatOption
from homeagent.cli.output import count, format_timestamp, print_facts, print_list, print_result, print_table
from homeagent.engine.target import DEFAULT_PATH, ENVIRONMENT_VARIABLE, resolve_target
from homeagent.environment import (
    BUSY_TIMEOUT,
    DURABILITY,
    POOL_SIZE,
    busy_timeout_or_default,
    durability_or_default,
    pool_size_or_default,
)
from homeagent.maintenance.status import DatabaseStatus
from homeagent.migrations import REVISION
from homeagent.version import __version__


@app.command()
def status(context: typer.Context) -> None:
    """Show the database's location, engine, schema, settings, file modes and row counts.

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
    # Do not show the counters, which exist only in the gateway's process.
    for title, facts in (("Pragmas", found.pragmas), ("File modes", found.file_modes)):
        if facts:
            typer.echo("\n" + typer.style(title, bold=True))
            print_facts((name, str(value)) for name, value in facts.items())


def _summary(found: DatabaseStatus) -> dict[str, str]:
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}.get(found.engine, found.engine)
    engine = f"{name} {found.engine_version}, through {found.driver} {found.driver_version}"
    epoch = f"{found.epoch}, restored at {format_timestamp(found.restored_at)}" if found.restored_at else None
    facts = {
        "Database": found.location,
        "Engine": engine,
        "Schema revision": found.schema_revision,
        "Application's revision": found.application_revision,
        "Epoch": epoch,
        "Durability": found.durability,
        "Write-ahead log": None if found.wal_bytes is None else count(found.wal_bytes, "byte"),
    }
    return {name: value for name, value in facts.items() if value is not None}


@app.command()
def config(context: typer.Context, form: FormatOption = Format.TABLE) -> None:
    """Show the settings of the commands, and the source of each setting. The command opens no database."""
    target = resolve_target(context.obj.database)
    source = _source(ENVIRONMENT_VARIABLE, f"default, {DEFAULT_PATH}") if context.obj.database is None else "--database"
    server = () if target.url is None else sorted(name for name in os.environ if name.startswith("PG"))
    busy_timeout = busy_timeout_or_default(BUSY_TIMEOUT).total_seconds()
    zone = datetime.now().astimezone()
    settings = [
        ("database", target.location, source),
        ("engine", "sqlite" if target.url is None else "postgresql", source),
        # Show variables of PostgreSQL's client, such as PGHOST, without the password.
        *((name, "set" if name == "PGPASSWORD" else os.environ[name], f"${name}") for name in server),
        ("durability", str(durability_or_default(DURABILITY)), _source("HOMEAGENT_DURABILITY")),
        ("busy timeout", f"{busy_timeout:g} s", _source("HOMEAGENT_BUSY_TIMEOUT")),
        ("pool size", str(pool_size_or_default(POOL_SIZE)), _source("HOMEAGENT_POOL_SIZE")),
        ("time zone", f"{zone:%Z %z}", _source("TZ", "system")),
        ("version", __version__, "package"),
        ("schema revision", REVISION, "package"),
        ("python", sys.version.split()[0], sys.executable),
    ]
    values = [{"setting": name, "value": value, "source": source} for name, value, source in settings]
    print_list(context, ("Setting", "Value", "Source"), settings, values)


def _source(variable: str, default: str = "default") -> str:
    return f"${variable}" if os.environ.get(variable) else default
