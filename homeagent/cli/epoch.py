"""The command `homeagent begin-epoch`, which begins a new epoch after a restore by other tools than homeagent."""

from __future__ import annotations

import typer

from homeagent.cli.application import app, confirm
from homeagent.cli.arguments import YesOption
from homeagent.cli.opening import target_of
from homeagent.cli.output import format_timestamp, print_result
from homeagent.database import Database
from homeagent.engine.target import resolve_target
from homeagent.environment import BUSY_TIMEOUT, busy_timeout_or_default


@app.command()
def begin_epoch(context: typer.Context, yes: YesOption = False) -> None:
    """Begin a new epoch after the database was restored by other means than 'homeagent restore'.

    Examples of other means are a server's own tools and a snapshot of a disk or of a virtual machine. Stop the gateways
    first. In the new epoch, gateways refuse messages that were signed before its beginning. At a terminal the command
    asks for a confirmation, because the beginning of an epoch cannot be undone.
    """
    location = resolve_target(target_of(context)).location
    confirm(context, f"Begin a new epoch of {location}?", yes=yes, only_at_terminal=True)
    report = Database.begin_epoch(target_of(context), busy_timeout=busy_timeout_or_default(BUSY_TIMEOUT))
    text = f"Epoch {report.epoch} of {report.location} begins at {format_timestamp(report.restored_at)}."
    print_result(context, report.model_dump(mode="json"), text)
