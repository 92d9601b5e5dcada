"""Commands that check and clean the database (`homeagent doctor` and `homeagent sweep`)."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from homeagent.cli.application import app, open_named
from homeagent.cli.arguments import AcknowledgeOption, DryRunOption, flag, option, seconds
from homeagent.cli.output import count, print_facts, print_result, shown_progress
from homeagent.cli.visible_text import escape_words
from homeagent.errors import InvalidArgumentError
from homeagent.maintenance.doctor import Diagnosis, Finding, Severity, diagnose
from homeagent.models.limits import Limits
from homeagent.models.types import MAX_LIMIT

_COLOURS = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.CRITICAL: "red"}


@app.command()
def doctor(
    context: typer.Context,
    thorough: Annotated[bool, flag("--thorough", "Run the full integrity check too, without a time limit.")] = False,
    fix: Annotated[bool, flag("--fix", "Make the repairs that lose no data, and list each repair.")] = False,
    acknowledge: AcknowledgeOption = None,
) -> None:
    """Check the database. For each problem, show its meaning and its remedy.

    Without --fix the command changes nothing. The checked database can be damaged, missing, too old or too new.

    Exit status: 0 without problems, 1 for warnings, 2 for critical problems.
    """
    try:
        with shown_progress(context, "checking"):
            diagnosis = diagnose(context.obj.database, thorough=thorough, fix=fix, acknowledged=acknowledge or ())
    except InvalidArgumentError as error:
        # Do not exit with status 1, by which the doctor reports warnings.
        raise typer.BadParameter(str(error)) from None
    print_result(context, diagnosis.model_dump(mode="json"), lambda: _print(diagnosis))
    raise typer.Exit(diagnosis.exit_status)


def _print(diagnosis: Diagnosis) -> None:
    for repair in diagnosis.repairs:
        typer.secho(f"Repaired, {repair.check}: {repair.action}.", fg="green")
    width = max((len(finding.check) for finding in diagnosis.findings), default=0)
    labels = [f"{finding.severity:<8}  {finding.check:<{width}}" for finding in diagnosis.findings]
    colours = {label: _COLOURS[finding.severity] for label, finding in zip(labels, diagnosis.findings, strict=True)}
    print_facts(zip(labels, map(_finding_text, diagnosis.findings), strict=True), colours=colours)
    for reason in dict.fromkeys(diagnosis.not_checked.values()):
        checks = [check for check, why in diagnosis.not_checked.items() if why == reason]
        print_facts([("not checked", f"{', '.join(checks)}: {reason}.")])
    bad = sum(finding.severity is not Severity.OK for finding in diagnosis.findings)
    verdict = "All is well" if not bad else f"{bad} of {len(diagnosis.findings)} checks found something"
    typer.secho(f"\n{diagnosis.location}: {verdict}.", fg=_COLOURS[diagnosis.severity])


def _finding_text(finding: Finding) -> str:
    lines = [escape_words(finding.summary)]
    if finding.meaning is not None:
        lines.append(f"It means: {finding.meaning}.")
    if finding.remedy is not None:
        lines.append(f"What to do: {finding.remedy}.")
    if finding.command is not None:
        lines.append(f"    {finding.command}")
    return "\n".join(lines)


def _days(help: str) -> Any:
    return option("DAYS", help, min=1, max=36_500, show_default=True)


@app.command()
def sweep(
    context: typer.Context,
    batch_size: Annotated[
        int, option("ROWS", "Maximum number of rows per transaction.", min=1, max=MAX_LIMIT, show_default=True)
    ] = 100,
    time_budget: Annotated[int | None, seconds("Longest time for the command.", min=1, show_default="no limit")] = None,
    pending_ttl: Annotated[int, _days("Delete devices that have been pending for more than DAYS.")] = 30,
    changes_kept: Annotated[int, _days("Delete device changes that are older than DAYS.")] = 7,
    dry_run: DryRunOption = False,
) -> None:
    """Delete expired nonces and idempotency keys. Also delete old device changes, and devices pending for too long.

    The gateway can keep running, because the transactions are small. With --dry-run the command only counts the rows.
    For --pending-ttl and --changes-kept, use the limits of the gateway.
    """
    budget = None if time_budget is None else timedelta(seconds=time_budget)
    limits = Limits(pending_ttl=timedelta(days=pending_ttl), changes_kept=timedelta(days=changes_kept))
    with open_named(context, limits) as opened:
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
