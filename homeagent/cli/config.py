"""The command `homeagent config`, which shows the settings of the commands and the source of each setting."""

from __future__ import annotations

import os
import sys
from datetime import datetime

import typer

from homeagent.cli.application import app, target_of
from homeagent.cli.arguments import Format, FormatOption
from homeagent.cli.output import print_list
from homeagent.engine.target import DEFAULT_PATH, ENVIRONMENT_VARIABLE, resolve_target
from homeagent.environment import (
    BUSY_TIMEOUT,
    DURABILITY,
    POOL_SIZE,
    busy_timeout_or_default,
    durability_or_default,
    pool_size_or_default,
)
from homeagent.migrations import REVISION
from homeagent.version import __version__


@app.command()
def config(context: typer.Context, form: FormatOption = Format.TABLE) -> None:
    """Show the settings of the commands, and where each setting comes from. The command opens no database."""
    named = target_of(context)
    target = resolve_target(named)
    if named is not None:
        source = "--database"
    else:
        source = f"${ENVIRONMENT_VARIABLE}" if os.environ.get(ENVIRONMENT_VARIABLE) else f"default, {DEFAULT_PATH}"
    settings = [("database", target.location, source)]
    settings.append(("engine", "sqlite" if target.url is None else "postgresql", source))
    if target.url is not None:
        # PostgreSQL's client library also reads variables such as PGHOST. A password is not shown.
        settings += [
            (name, "set" if name == "PGPASSWORD" else value, f"${name}")
            for name, value in sorted(os.environ.items())
            if name.startswith("PG")
        ]
    durability = durability_or_default(DURABILITY)
    busy_timeout = busy_timeout_or_default(BUSY_TIMEOUT).total_seconds()
    pool_size = pool_size_or_default(POOL_SIZE)
    settings += [
        (name, str(value), f"${variable}" if os.environ.get(variable) else "default")
        for name, value, variable in (
            ("durability", durability, "HOMEAGENT_DURABILITY"),
            ("busy timeout", f"{busy_timeout:g} s", "HOMEAGENT_BUSY_TIMEOUT"),
            ("pool size", pool_size, "HOMEAGENT_POOL_SIZE"),
        )
    ]
    zone = datetime.now().astimezone()
    settings += [
        ("time zone", f"{zone:%Z %z}", "$TZ" if os.environ.get("TZ") else "system"),
        ("version", __version__, "package"),
        ("schema revision", REVISION, "package"),
        ("python", sys.version.split()[0], sys.executable),
    ]
    values = [{"setting": name, "value": value, "source": source} for name, value, source in settings]
    print_list(context, ("Setting", "Value", "Source"), settings, values, form)
