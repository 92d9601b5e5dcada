"""The command `homeagent begin-epoch`, which begins a new epoch after a restore by a tool other than homeagent."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from homeagent.cli.application import app, confirm
from homeagent.cli.arguments import YesOption, option
from homeagent.cli.opening import open_named, target_of
from homeagent.cli.output import format_timestamp, print_facts, print_result
from homeagent.cli.request import require_expected
from homeagent.cli.visible_text import identity
from homeagent.database import Database
from homeagent.environment import BUSY_TIMEOUT, busy_timeout_or_default


@app.command()
def begin_epoch(
    context: typer.Context,
    epoch: Annotated[
        int | None, option(metavar="NUMBER", help="Refuse the change if the database has another epoch.")
    ] = None,
    yes: YesOption = False,
) -> None:
    """Begin a new epoch after the database was restored by other means than 'homeagent restore'.

    Run the command, for example, after the tools of a server or a snapshot of a disk restored the database. Stop the
    gateways first. In the new epoch, gateways refuse messages that were signed before the epoch began. The beginning of
    an epoch cannot be undone, so the command shows the current epoch and asks for a confirmation. The option --yes
    needs --epoch.
    """
    require_expected(yes=yes, option="--epoch", value=epoch, source="as 'status --json' prints it")
    if not yes:
        with open_named(context) as opened:
            seen = opened.status()
        facts = {
            "Database": identity(seen.location),
            "Epoch": str(seen.epoch),
            "Restored at": format_timestamp(seen.restored_at),
        }
        show = partial(print_facts, facts.items(), error=True)
        confirm(context, "Begin a new epoch of this database?", yes=False, show=show)
        epoch = seen.epoch if epoch is None else epoch
    report = Database.begin_epoch(
        target_of(context), busy_timeout=busy_timeout_or_default(BUSY_TIMEOUT), expected_epoch=epoch
    )
    text = f"Epoch {report.epoch} of {report.location} begins at {format_timestamp(report.restored_at)}."
    print_result(context, report.model_dump(mode="json"), text)
