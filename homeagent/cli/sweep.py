"""Command that deletes expired nonces and idempotency keys (`homeagent sweep`)."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from homeagent.cli.application import app, open_named
from homeagent.cli.arguments import DryRunOption
from homeagent.cli.output import count, print_result
from homeagent.models.types import MAX_LIMIT

_LONGEST_BUDGET = 366 * 24 * 3600.0


def _budget(seconds: float | None) -> float | None:
    # Do not split the chained comparison: `seconds < 0.001 or seconds > _LONGEST_BUDGET` would accept the value NaN.
    if seconds is not None and not 0.001 <= seconds <= _LONGEST_BUDGET:
        raise typer.BadParameter("it must be from 0.001 seconds to 366 days.")
    return seconds


@app.command()
def sweep(
    context: typer.Context,
    batch_size: Annotated[
        int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of rows per transaction.")
    ] = 100,
    time_budget: Annotated[
        float | None,
        typer.Option(
            callback=_budget, metavar="SECONDS", help="Longest time for the command.", show_default="until all is done"
        ),
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Delete expired nonces and idempotency keys, old device changes, and devices that waited for over 30 days.

    The command works in small transactions, so the gateway can run at the same time. With --dry-run the command counts
    the rows and deletes none of them.
    """
    budget = None if time_budget is None else timedelta(seconds=time_budget)
    with open_named(context) as opened:
        report = opened.sweep(batch_size=batch_size, time_budget=budget, dry_run=dry_run)
    print_result(
        context,
        {**({"dry_run": True} if dry_run else {}), **report.model_dump(mode="json")},
        f"{'Would remove' if dry_run else 'Removed'} {count(report.nonces, 'nonce')} and "
        + count(report.idempotency_keys, "idempotency key")
        + (f", and {count(report.pending_devices, 'device')} without an approval" if report.pending_devices else "")
        + (f", and {count(report.device_changes, 'old device change')}" if report.device_changes else "")
        + (". Nothing was changed." if dry_run else ".")
        + (f" Skipped {count(report.skipped, 'row')}: {', '.join(report.constraints)}." if report.skipped else "")
        + (" The time budget ended the sweep early: sweep again." if report.more else ""),
    )
