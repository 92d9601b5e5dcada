"""`homeagent restore`: a backup takes the place of the database."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, app
from homeagent.cli.opening import target_of
from homeagent.cli.output import JsonOption, instant, print_json
from homeagent.database import Database


@app.command()
def restore(
    context: typer.Context,
    backup: Annotated[
        str, typer.Argument(metavar="BACKUP", help="The backup to restore; it stays as it is.", show_default=False)
    ],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a backup in the place of the database, and keep what was there aside.

    Stop the gateway first, and see that the clock is right. The backup is verified, and a new epoch begins: messages
    that were signed before are refused.
    """
    report = Database.restore(backup, target_of(context, database))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    typer.echo(f"Restored {report.database} from {report.backup}: epoch {report.epoch} begins.")
    if report.taken_at is not None:
        typer.echo(f"It is as it was at {instant(report.taken_at)}.")
    if report.kept_aside is not None:
        typer.echo(f"What was there is kept in {report.kept_aside}.")
    if report.readmitted_devices is None:
        typer.echo("Who was revoked since the backup can't be told: look through 'devices list --status approved'.")
    for device_id in report.readmitted_devices or ():
        typer.echo(f"{device_id!r} may enter again, or in a role that it had lost: revoke it, or be sure.")
    for device_id in report.old_secret_devices or ():
        typer.echo(f"{device_id!r} has an older secret again: rotate it.")
