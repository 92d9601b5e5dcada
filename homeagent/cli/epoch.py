"""The command `homeagent begin-epoch`, which begins a new epoch after a restore by other tools than homeagent."""

from __future__ import annotations

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, app
from homeagent.cli.opening import target_of
from homeagent.cli.output import format_timestamp, print_json
from homeagent.database import Database


@app.command()
def begin_epoch(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Begin a new epoch after the database was restored by other means than 'homeagent restore'.

    Examples of other means are a server's own tools and a snapshot of a disk or of a virtual machine. Stop the gateways
    first. In the new epoch, gateways refuse messages that were signed before its beginning.
    """
    report = Database.begin_epoch(target_of(context, database))
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(f"Epoch {report.epoch} of {report.location} begins at {format_timestamp(report.restored_at)}.")
