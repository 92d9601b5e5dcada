"""The command `homeagent restore`, which replaces the database by a backup."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import app, confirm
from homeagent.cli.arguments import AcknowledgeOption, YesOption, argument
from homeagent.cli.opening import target_of
from homeagent.cli.output import format_timestamp, print_result
from homeagent.cli.progress import shown_activity
from homeagent.cli.visible_text import quoted
from homeagent.database import Database
from homeagent.engine.target import resolve_target
from homeagent.environment import BUSY_TIMEOUT, busy_timeout_or_default
from homeagent.maintenance import RestoreReport


@app.command()
def restore(
    context: typer.Context,
    backup: Annotated[str, argument(metavar="BACKUP", help="Backup to restore. The command does not change it.")],
    acknowledge: AcknowledgeOption = None,
    yes: YesOption = False,
) -> None:
    """Replace the database by a backup, and keep the old database in quarantine.

    At a terminal the command asks for a confirmation. First stop the gateway, and check that the system's clock is
    right. The command verifies the backup and begins a new epoch. After a restore, gateways refuse messages that were
    signed before the restore.
    """
    location = resolve_target(target_of(context)).location
    confirm(context, f"Replace {location} by {backup}?", yes=yes, only_at_terminal=True)
    with shown_activity(context, "verifying and restoring"):
        report = Database.restore(
            backup,
            target_of(context),
            acknowledged=acknowledge or (),
            busy_timeout=busy_timeout_or_default(BUSY_TIMEOUT),
        )
    print_result(context, report.model_dump(mode="json"), lambda: _print(report))


def _print(report: RestoreReport) -> None:
    typer.echo(f"Restored {report.database} from {report.backup}: epoch {report.epoch} begins.")
    if report.taken_at is not None:
        typer.echo(f"The backup holds the state of {format_timestamp(report.taken_at)}.")
    if report.kept_aside is not None:
        typer.echo(f"The old database is kept in {report.kept_aside}.")
    if report.readmitted_devices is None:
        typer.echo(
            "The devices revoked since the backup are unknown: check each device of 'devices list --status approved'."
        )
    for device_id in report.readmitted_devices or ():
        typer.echo(
            f"{quoted(device_id)} has an approval or a role again that it had lost since the backup: "
            "check or revoke it."
        )
    for device_id in report.old_secret_devices or ():
        typer.echo(f"{quoted(device_id)} has an older secret again: rotate the secret.")
