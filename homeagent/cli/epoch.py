"""`homeagent begin-epoch`: say that a store was set back by other means than `restore`."""

from __future__ import annotations

import typer

from homeagent.cli.application import DatabaseOption, app
from homeagent.cli.opening import target_of
from homeagent.cli.output import JsonOption, instant, print_json
from homeagent.database import Database


@app.command()
def begin_epoch(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Say that the database was set back by other means than 'restore'.

    After a server's own tools, or the snapshot of a disk or of a virtual machine. Stop the gateways first. Messages
    that were signed before now are refused from then on, as after a restore.
    """
    report = Database.begin_epoch(target_of(context, database))
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(f"Epoch {report.epoch} of {report.location} begins at {instant(report.restored_at)}.")
